"""Who is calling, and may they call this route."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from attrs import define
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from vllmproxy.errors import AuthError, ExpiredKey, Forbidden, StoreDown, UnknownKey
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.credentials import Credential
from vllmproxy.keys.key import VirtualKey
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.keys.policy import Policy, compile_policy
from vllmproxy.keys.routes import Group
from vllmproxy.store.interface import Store, StoreUnavailable

_NO_KEY = (
    "Authentication Error, No api key passed in. Send it as `Authorization: Bearer <key>`, "
    "`x-litellm-api-key`, `api-key` or `x-api-key`."
)
_MALFORMED = (
    "Authentication Error, Malformed API Key passed in. Ensure Key has `Bearer ` prefix. Nor may it be empty: is its "
    "variable set?"
)
_UNKNOWN = "Authentication Error, Invalid proxy server token passed. There is no such key here, or no longer."
_BLOCKED = "Authentication Error, Key is blocked. Whoever holds the master key can give you another one."
_REFUSED = "Virtual key is not allowed to call this route. "
_WHY: Final[dict[str, str]] = {
    "admin": "It changes the server for everybody: only the master key may call it, and keys that it gave this route.",
    "unknown": "Only the master key may call paths that this proxy does not know, and keys that it gave them.",
}
_RESTRICTED = "Its key_type or its allowed_routes leave this one out."
_AUTH_IS_OFF = " Authentication is off: start with --master-key-file and use the master key."


@define  # not frozen, which takes three times as long to make: there is one for each request
class Caller:
    """Somebody who was let in.

    :ivar key_id: the virtual key's sha256 hex, ``"master"``, or ``None`` while authentication is off.
    """

    key_id: str | None
    key_alias: str | None = None
    is_master: bool = False
    key: VirtualKey | None = None


#: How often the store is asked for a key that changes each time before it has answered.
_MOST_ASKED: Final = 4


@define(eq=False)
class _LookUp:
    """One question to the store.

    :ivar waiters: who waits for the answer, and whether what is known will do where there is none.
    :ivar asked: the how manieth question it is for one of them.
    """

    waiters: list[tuple[Deferred[VirtualKey | None], bool]]
    asked: int = 1


#: Everybody, while authentication is off.
ANONYMOUS: Final = Caller(None)
MASTER: Final = Caller("master", is_master=True)

#: What is open to everybody while authentication is off.
_ANYBODY: Final[Policy] = compile_policy("default", (), granted_by_master=False)


def store_down() -> StoreDown:
    """Return the refusal for a time when keys cannot be looked up."""
    return StoreDown("The store of keys and limits does not answer just now. Try again in a moment.")


class Gate:
    """Tells callers apart by their key.

    :param master: ``None``: authentication is off, every credential is as good as none. It may be exchanged.
    :param clock: ``seconds()`` is the time of day, seconds since the epoch.
    """

    def __init__(self, store: Store, cache: KeyCache, master: MasterKey | None, clock: IReactorTime) -> None:
        self._store = store
        self._cache = cache
        self.master = master
        self._clock = clock
        self._pending: dict[str, _LookUp] = {}
        self._doubted: dict[str, _LookUp] = {}
        self._watchers: list[Callable[[str | None], None]] = []

    def identify(self, credential: Credential) -> Caller | Deferred[Caller]:
        """Return the caller at once where the cache knows the key, else when the store has answered.

        While the store does not answer, a key that it gave not long ago is as it was then (see
        :class:`~vllmproxy.keys.cache.KeyCache`). Raises (or fails with) :class:`AuthError` and its kin, and
        :class:`StoreDown`. Cancelling the Deferred leaves other callers who wait for the same key alone.
        """
        if self.master is None:
            return ANONYMOUS
        if credential.state != "present":
            raise AuthError(_NO_KEY if credential.state == "none" else _MALFORMED)
        token = credential.token
        if self.master.matches_token(token):
            return MASTER
        return self.admit(token)

    def admit(self, token: str, *, stale: bool = True) -> Caller | Deferred[Caller]:
        """Return whom the virtual key with that id (sha256 hex) belongs to, as :meth:`identify` does.

        :param stale: while the store does not answer, a key as it was not long ago will do.
        """
        key = self._cache.get(token)
        if key is not None or self._cache.is_unknown(token):
            return self._admit(key)
        waiter: Deferred[VirtualKey | None] = Deferred()
        answer = waiter.addCallbacks(self._admit, _store_failed)
        self._ask(token, _LookUp([(waiter, stale)]))
        return answer

    def check_route(self, caller: Caller, group: Group, path: bytes, base: bytes) -> None:
        """Return if ``caller`` may call this route of vLLM, else raise :class:`Forbidden`.

        :param group: what :func:`~vllmproxy.keys.routes.group_for` says of ``path`` and ``base``.
        :param path: the forwarded path, raw, without the query.
        :param base: the path of the upstream's URL.
        """
        if caller.is_master:
            return
        policy = _ANYBODY if caller.key is None else caller.key.policy
        if policy.opens(group, path, base):
            return
        why = _WHY.get(group, _RESTRICTED)
        raise Forbidden(_REFUSED + why + ("" if caller.key_id else _AUTH_IS_OFF))

    def is_master_token(self, token: str) -> bool:
        """Tell whether ``token`` is the master key's sha256 hex: no virtual key may be made of it."""
        return self.master is not None and self.master.matches_token(token)

    def changed(self, token: str | None) -> None:
        """Take in what :meth:`Store.watch_keys <vllmproxy.store.interface.Store.watch_keys>` tells.

        What is known of a key is forgotten, and asked for again. An answer that the store has under way may be older
        than the change: whoever waits for it has the store asked once more. Where no key is named, it is remembered
        like one that came just before: for an outage.
        """
        if token is None:
            self._cache.doubt()
            self._doubted, self._pending = self._pending, {}
        else:
            self._cache.forget(token)
            self._pending.pop(token, None)
            self._doubted.pop(token, None)
        for changed in self._watchers:
            changed(token)

    def watch(self, changed: Callable[[str | None], None]) -> None:
        """Have ``changed`` called for every key that is changed or deleted, here or by another process.

        It gets the key's token, perhaps more than once for one change, or ``None``: any of them may have changed
        unheard. By then this gate knows nothing of the key that is older. It must not raise.
        """
        self._watchers.append(changed)

    def _admit(self, key: VirtualKey | None) -> Caller:
        if key is None:
            raise UnknownKey(_UNKNOWN)
        if key.blocked:
            raise AuthError(_BLOCKED)
        if key.expires is not None and self._clock.seconds() >= key.expires:
            when = datetime.fromtimestamp(key.expires, UTC).isoformat(timespec="seconds")
            raise ExpiredKey(f"Authentication Error - Expired Key. It expired at {when}.")
        return Caller(key.token, key.key_alias, key=key)

    def _ask(self, token: str, look_up: _LookUp) -> None:
        asking = self._pending.get(token)
        if asking is not None:
            asking.waiters += look_up.waiters
            asking.asked = max(asking.asked, look_up.asked)
        else:
            self._pending[token] = look_up
            self._store.get_key(token).addBoth(self._settle, token, look_up)

    def _settle(self, result: VirtualKey | Failure | None, token: str, look_up: _LookUp) -> None:
        is_current = self._pending.get(token) is look_up
        if is_current:
            del self._pending[token]
        is_doubted = self._doubted.get(token) is look_up
        if is_doubted:
            del self._doubted[token]
        if isinstance(result, Failure):
            self._tell(result, token, look_up)
        elif is_current:
            self._cache.put(token, result)
            self._tell(result, token, look_up)
        else:
            if is_doubted:
                self._cache.put_doubted(token, result)
            self._ask_again(token, look_up)

    def _ask_again(self, token: str, look_up: _LookUp) -> None:
        """The key may have changed since the store was asked."""
        if look_up.asked < _MOST_ASKED:
            look_up.asked += 1
            self._ask(token, look_up)
        else:
            away = StoreUnavailable("the key changes faster than it can be looked up")
            self._tell(Failure(away), token, look_up)

    def _tell(self, result: VirtualKey | Failure | None, token: str, look_up: _LookUp) -> None:
        known = None
        if isinstance(result, Failure) and result.check(StoreUnavailable):
            known = self._cache.get_stale(token)
        for waiter, stale in look_up.waiters:
            # One that was cancelled meanwhile drops this silently: Deferred's own rule.
            waiter.callback(known if known is not None and stale else result)


def _store_failed(failure: Failure) -> Failure:
    if isinstance(failure.value, StoreUnavailable):
        raise store_down()
    return failure
