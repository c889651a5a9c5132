"""Limits that go on, in part, while the store that counts them for all proxies is away."""

from collections.abc import Sequence
from typing import Final, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from vllmproxy.limits.interface import Limiter
from vllmproxy.limits.values import Ask, Denied, Granted, Rule
from vllmproxy.store.interface import StoreUnavailable

#: What one proxy may count by itself for a while. Anything else, as money, nobody gives away uncounted.
LOCAL_KINDS: Final = frozenset({"requests", "tokens", "max_parallel_requests"})


class LocalLimiter(Protocol):
    """A :class:`~vllmproxy.limits.interface.Limiter` that answers at once."""

    def reserve_now(self, ask: Ask) -> Granted | Denied: ...

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None: ...

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str]: ...


class FallbackLimiter:
    """The :class:`~vllmproxy.limits.interface.Limiter` that asks one that proxies share, and while that is away one
    of this process, for a share of each limit. What was taken at one of them is settled and renewed there.

    :param shared: is asked first, for every reservation.
    :param local: is asked while that one is away.
    :param share: above 0, up to 1. Of a limit of 1 or more at least 1 is left.
    """

    def __init__(self, shared: Limiter, local: LocalLimiter, share: float) -> None:
        self._shared = shared
        self._local = local
        self._share = share
        #: Key and request id of what is taken at ``local``; everything that is taken is settled.
        self._here: set[tuple[str, str]] = set()

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        decision = self._shared.reserve(ask)
        return decision.addErrback(self._reserve_here, ask) if isinstance(decision, Deferred) else decision

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        if (key, request_id) not in self._here:
            self._shared.settle(key, request_id, costs)
            return
        self._here.discard((key, request_id))
        self._local.settle(key, request_id, costs)

    async def finish(self) -> None:
        await self._shared.finish()

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        here = [request_id for request_id in request_ids if (key, request_id) in self._here]
        lost = self._local.renew(key, here) if here else []
        there = [request_id for request_id in request_ids if (key, request_id) not in self._here]
        if not there:
            return lost
        more = self._shared.renew(key, there)
        return more.addCallback(lambda ids: lost + ids) if isinstance(more, Deferred) else lost + more

    def _reserve_here(self, failure: Failure, ask: Ask) -> Granted | Denied:
        if failure.check(StoreUnavailable) is None or any(rule.kind not in LOCAL_KINDS for rule in ask.rules):
            failure.raiseException()
        decision = self._local.reserve_now(Ask(ask.key, ask.request_id, tuple(map(self._part, ask.rules)), ask.ahead))
        if isinstance(decision, Granted):
            self._here.add((ask.key, ask.request_id))
        elif decision.never and ask.rules[decision.rule].cost <= ask.rules[decision.rule].limit:
            failure.raiseException()  # more than the share, and not than the limit: waiting does help
        return decision

    def _part(self, rule: Rule) -> Rule:
        limit = max(min(rule.limit, 1), int(rule.limit * self._share))
        return Rule(rule.kind, rule.scope, limit, rule.cost, rule.period, rule.least)
