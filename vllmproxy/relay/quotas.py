"""What a request takes of its key's limits: reserved before it is forwarded, settled when it is over."""

import math
from datetime import UTC, datetime

from attrs import frozen
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import RateLimited
from vllmproxy.keys.gate import store_down
from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.interface import Limiter
from vllmproxy.limits.values import Ask, Denied, Granted
from vllmproxy.relay.headers import fresh_id
from vllmproxy.store.interface import StoreUnavailable

_log = Logger()

#: Seconds between renewals of the leases of running requests: a third of a lease, so that two may fail.
RENEWAL = 15.0
#: Leases renewed in one call.
_BATCH = 500
#: Seconds between tries to settle while the store is away, for how long it matters, and how many are kept.
RETRY = 1.0
WINDOW = 60.0
_MOST_DEBTS = 10_000


@frozen
class _Debt:
    """A settlement that the store has not heard yet; ``until``: when it no longer matters."""

    key: str
    request_id: str
    costs: tuple[int | None, ...]
    until: float


@frozen
class Reservation:
    """What one request has taken.

    :ivar ask: what was asked for; its request id is the proxy's own, as the client's may come twice.
    :ivar remaining: for each rule, what was left.
    """

    ask: Ask
    remaining: tuple[int, ...]

    @property
    def lines(self) -> bytes:
        """Header lines that tell the caller how much is left (LiteLLM's names)."""
        lines = b""
        for rule, remaining in zip(self.ask.rules, self.remaining, strict=True):
            if rule.kind == "requests":
                lines += b"x-ratelimit-api_key-limit-requests: %d\r\n" % rule.limit
                lines += b"x-ratelimit-api_key-remaining-requests: %d\r\n" % remaining
        return lines


class Quotas:
    """Takes from a limiter, gives back, and keeps the leases of running requests alive."""

    def __init__(self, limiter: Limiter, clock: IReactorTime) -> None:
        self._limiter = limiter
        self._leases: dict[str, set[str]] = {}
        self._renewing = LoopingCall(self._renew)
        self._renewing.clock = clock
        self._clock = clock
        self._closed = False
        self._telling: set[Deferred[None]] = set()
        self._debts: list[_Debt] = []
        self._retrying = LoopingCall(self._retry)
        self._retrying.clock = clock

    def reserve(self, key: VirtualKey) -> Reservation | Deferred[Reservation] | None:
        """Take what one request of ``key`` costs; ``None`` where the key has no limits.

        Raises, or fails with, :class:`RateLimited`, and :class:`StoreDown` while nobody can count.
        """
        rules = key.rules
        if not rules:
            return None
        ask = Ask(key.token, fresh_id().decode("ascii"), rules)
        decision = self._limiter.reserve(ask)
        if isinstance(decision, Deferred):
            return decision.addCallbacks(self._decided, _cannot_count, callbackArgs=(ask,))
        return self._decided(decision, ask)

    def _decided(self, decision: Granted | Denied, ask: Ask) -> Reservation:
        if isinstance(decision, Denied):
            raise _refusal(decision, ask)
        if any(rule.kind == "max_parallel_requests" for rule in ask.rules):
            self._leases.setdefault(ask.key, set()).add(ask.request_id)
            if not self._renewing.running:
                self._renewing.start(RENEWAL, now=False)
        return Reservation(ask, decision.remaining)

    def settle(self, reservation: Reservation, *, forwarded: bool) -> None:
        """Give back what was not used: all of it, where the request was never forwarded."""
        ask = reservation.ask
        held = self._leases.get(ask.key)
        if held is not None:
            held.discard(ask.request_id)
            if not held:
                del self._leases[ask.key]
        costs = tuple(None if forwarded else 0 for _ in ask.rules)
        self._tell(_Debt(ask.key, ask.request_id, costs, self._clock.seconds() + WINDOW))

    def _tell(self, debt: "_Debt") -> None:
        settled = self._limiter.settle(debt.key, debt.request_id, debt.costs)
        if settled is not None:
            self._telling.add(settled)
            settled.addErrback(self._not_told, debt)
            settled.addBoth(lambda _: self._telling.discard(settled))

    def _not_told(self, reason: Failure, debt: "_Debt") -> None:
        """The store is away: tell it again soon, as long as it matters. Only the first time counts."""
        if reason.check(StoreUnavailable) is None:
            _log.failure("Settling a reservation failed", reason)
        elif not self._closed and len(self._debts) < _MOST_DEBTS and debt.until > self._clock.seconds():
            self._debts.append(debt)
            if not self._retrying.running:
                self._retrying.start(RETRY, now=False)

    def _retry(self) -> None:
        debts, self._debts = self._debts, []
        for debt in debts:
            self._tell(debt)
        if not debts:
            self._retrying.stop()

    def _renew(self) -> None:
        if not self._leases:
            self._renewing.stop()
        for key, held in self._leases.items():
            ids = list(held)
            for start in range(0, len(ids), _BATCH):
                lost = self._limiter.renew(key, ids[start : start + _BATCH])
                if isinstance(lost, Deferred):
                    lost.addErrback(_not_renewed)

    async def close(self) -> None:
        """Renew no more, and let what is being settled arrive; what is left ends by itself."""
        self._closed = True
        for loop in (self._renewing, self._retrying):
            if loop.running:
                loop.stop()
        await DeferredList(list(self._telling))


def _refusal(denied: Denied, ask: Ask) -> RateLimited:
    rule = ask.rules[denied.rule]
    reset_at = datetime.fromtimestamp(denied.reset_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return RateLimited(
        f"Rate limit exceeded for api_key: {ask.key}. Limit type: {rule.kind}. Current limit: {rule.limit}, "
        f"Remaining: 0. Limit resets at: {reset_at}",
        headers=(
            (b"retry-after", b"%d" % max(math.ceil(denied.retry_after), 1)),
            (b"rate_limit_type", rule.kind.encode()),
            (b"reset_at", reset_at.encode()),
        ),
    )


def _cannot_count(reason: Failure) -> Failure:
    if reason.check(StoreUnavailable):
        raise store_down()
    return reason


def _not_renewed(reason: Failure) -> None:
    """The store is away; there are two more tries before a lease ends."""
    if reason.check(StoreUnavailable) is None:
        _log.failure("Renewing leases failed", reason)
