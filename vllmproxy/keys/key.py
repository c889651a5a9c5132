"""The virtual key as a value."""

import hashlib
from functools import cached_property
from typing import Any

from attrs import field, frozen

from vllmproxy.keys.policy import Policy, compile_policy
from vllmproxy.limits.values import Rule


def hash_key(key: str | bytes) -> str:
    """Return the sha256 hex of a key: its id everywhere (LiteLLM's ``token``); the key itself is never kept."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


@frozen(kw_only=True)
class VirtualKey:
    """A stored virtual key: LiteLLM's row, in its field names. Times are seconds since the epoch (UTC).

    :ivar token: ``hash_key`` of the key.
    :ivar key_name: ``sk-...`` and the key's last four characters, for people to recognise it by.
    :ivar expires: when it stops working, ``None``: never.
    :ivar key_type: one of :data:`~vllmproxy.keys.policy.KEY_TYPES`.
    :ivar allowed_routes: paths and groups as they were given; empty: all that the type opens.
    :ivar rpm_limit: requests in any 60 seconds, ``None``: no limit.
    :ivar max_parallel_requests: requests at a time, ``None``: no limit.
    :ivar granted_by_master: the master key set the two: only then do they open admin routes or the key API.
    """

    token: str
    key_name: str
    key_alias: str | None = None
    user_id: str | None = None
    team_id: str | None = None
    metadata: dict[str, Any] = field(factory=dict)
    tags: tuple[str, ...] = ()
    blocked: bool = False
    expires: float | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
    created_by: str | None = None
    updated_by: str | None = None
    key_type: str = "default"
    allowed_routes: tuple[str, ...] = ()
    granted_by_master: bool = False
    rpm_limit: int | None = None
    max_parallel_requests: int | None = None

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """What one request takes of this key's limits; compiled when first asked for, empty without limits."""
        rules = []
        if self.rpm_limit is not None:
            rules.append(Rule("requests", "", self.rpm_limit, 1))
        if self.max_parallel_requests is not None:
            rules.append(Rule("max_parallel_requests", "", self.max_parallel_requests, 1))
        return tuple(rules)

    @cached_property
    def policy(self) -> Policy:
        """What this key opens; compiled when first asked for."""
        return compile_policy(self.key_type, self.allowed_routes, granted_by_master=self.granted_by_master)
