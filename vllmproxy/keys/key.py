"""The virtual key as a value."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from attrs import field, frozen

from vllmproxy.keys.budget import Budget
from vllmproxy.keys.models import Models
from vllmproxy.keys.policy import Policy, compile_policy


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
    :ivar models: names of models that it may use, one trailing ``*`` allowed; empty: all.
    :ivar aliases: what it calls a model → what vLLM calls it.
    :ivar rpm_limit: requests in any 60 seconds, ``None``: no limit; ``tpm_limit``: tokens.
    :ivar model_rpm_limit: the same for single models, by either of their names.
    :ivar max_parallel_requests: requests at a time, ``None``: no limit.
    :ivar max_budget: micro-units of money in a period of ``budget_duration``; ``max_budget_tokens``: tokens.
    :ivar soft_budget: micro-units after which somebody is told.
    :ivar budget_start: see :class:`~vllmproxy.keys.budget.Budget`, as for ``budget_reset_at``.
    :ivar granted_by_master: the master key set type and routes: only then do they open admin routes or the key API.
    :ivar model_rules: which models it may use, and what it calls them.
    :ivar budget: what it may spend.
    :ivar counts_tokens: whether a limit or a budget needs the tokens of each request.
    :ivar needs_model: whether a request has to say plainly which model it is for.
    :ivar needs_body: whether a request's body has to be read before it is forwarded.
    :ivar policy: what it opens.

    :raises ValueError: a key type or a route that is none.
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
    models: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(factory=dict)
    rpm_limit: int | None = None
    tpm_limit: int | None = None
    model_rpm_limit: Mapping[str, int] = field(factory=dict)
    model_tpm_limit: Mapping[str, int] = field(factory=dict)
    max_parallel_requests: int | None = None
    max_budget: int | None = None
    soft_budget: int | None = None
    max_budget_tokens: int | None = None
    budget_duration: str | None = None
    budget_start: int = 0
    budget_reset_at: int | None = None
    # What follows from these. It is made with the key: to make it when first asked for would take a ``__getattr__``,
    # which makes each look at any of the others slower.
    model_rules: Models = field(init=False, eq=False, repr=False)
    budget: Budget = field(init=False, eq=False, repr=False)
    counts_tokens: bool = field(init=False, eq=False, repr=False)
    needs_model: bool = field(init=False, eq=False, repr=False)
    needs_body: bool = field(init=False, eq=False, repr=False)
    policy: Policy = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        budget = Budget(
            money=self.max_budget,
            soft=self.soft_budget,
            tokens=self.max_budget_tokens,
            duration=self.budget_duration,
            start=self.budget_start,
            reset_at=self.budget_reset_at,
        )
        counts_tokens = self.tpm_limit is not None or bool(self.model_tpm_limit) or budget.is_limited
        needs_model = bool(self.models or self.model_rpm_limit or self.model_tpm_limit) or budget.is_priced
        put = object.__setattr__
        put(self, "model_rules", Models(frozenset(self.models), self.aliases))
        put(self, "budget", budget)
        put(self, "counts_tokens", counts_tokens)
        put(self, "needs_model", needs_model)
        put(self, "needs_body", needs_model or bool(self.aliases) or counts_tokens)
        put(self, "policy", _policy_of(self.key_type, self.allowed_routes, self.granted_by_master))


@lru_cache(maxsize=1024)
def _policy_of(key_type: str, allowed_routes: tuple[str, ...], granted_by_master: bool) -> Policy:
    """Return what many keys have in common."""
    return compile_policy(key_type, allowed_routes, granted_by_master=granted_by_master)
