"""A call that manages keys: who makes it, how far it may go, and what is written down about it."""

from collections.abc import Mapping
from typing import Any, Final

from attrs import frozen
from twisted.web.iweb import IRequest

from vllmproxy.api.fields import row_of
from vllmproxy.errors import Forbidden, NotFound
from vllmproxy.keys.gate import Caller
from vllmproxy.keys.key import VirtualKey
from vllmproxy.keys.policy import compile_policy
from vllmproxy.relay.headers import request_id_in
from vllmproxy.store.interface import AuditEntry
from vllmproxy.usage.sums import NO_ACCOUNT, Account

KEY_NOT_FOUND: Final = "Key not found in database"


@frozen
class ManagementCall:
    """One call.

    :ivar endpoint: its path, with names for what varies in it.
    :ivar time: when it came, seconds since the epoch.
    :ivar request_id: as in the access log.
    """

    caller: Caller
    endpoint: str
    time: float
    request_id: str | None

    @property
    def actor(self) -> str:
        """Who makes it: a key's id, or ``master``."""
        return self.caller.key_id or ""

    def check(self, key: VirtualKey) -> None:
        """Raise :class:`Forbidden` if ``key``, as it is or is to be, opens what only the master key can give."""
        if self.caller.is_master:
            return
        as_if = compile_policy(key.key_type, key.allowed_routes, granted_by_master=True)
        if key.policy.is_elevated or as_if.is_elevated:
            raise Forbidden(
                "Only the master key may manage keys that manage keys, or that open admin routes or routes "
                "which this proxy does not know."
            )

    def find(self, found: Mapping[str, VirtualKey], token: str, alias: str | None = None) -> VirtualKey:
        """Return a key that this call may change. Raises :class:`NotFound`, :class:`Forbidden`.

        :param alias: what it was found by; it may have moved to another key since.
        """
        key = found.get(token)
        if key is None or (alias is not None and key.key_alias != alias):
            raise NotFound(f"{KEY_NOT_FOUND}.", param="key")
        self.check(key)
        return key

    def changed(self, before: VirtualKey | None, after: VirtualKey | None) -> AuditEntry:
        """Return what is written down when a key changes."""
        target = before or after
        return self._entry(
            target=None if target is None else target.token,
            before=None if before is None else _audited(before, self.time),
            after=None if after is None else _audited(after, self.time),
        )

    def spent(self, key: VirtualKey, before: Account, after: Account) -> AuditEntry:
        """Return what is written down when it is set what a key has spent."""
        rows = (_audited(key, self.time, account) for account in (before, after))
        return self._entry(target=key.token, **dict(zip(("before", "after"), rows, strict=True)))

    def refused(self, status: int) -> AuditEntry:
        """Return what is written down when nothing comes of it."""
        return self._entry(status=status)

    def _entry(self, **fields: Any) -> AuditEntry:
        return AuditEntry(time=self.time, actor=self.actor, action=self.endpoint, request_id=self.request_id, **fields)


def request_id_of(request: IRequest) -> str | None:
    """Return the request's id, if it has a sane one."""
    id = request_id_in({b"x-request-id": request.requestHeaders.getRawHeaders(b"x-request-id", [])})
    return None if id is None else id.decode("ascii")


def _audited(key: VirtualKey, now: float, account: Account | None = None) -> dict[str, Any]:
    row = {"token": key.token, **row_of(key, now, account or NO_ACCOUNT)}
    if account is None:
        del row["spend"], row["spend_tokens"]  # they are no part of the key, and change by themselves
    return row
