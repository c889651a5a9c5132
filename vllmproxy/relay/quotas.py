"""What a request takes of its key's limits: reserved before it is forwarded, settled when it is over."""

import math
from datetime import UTC, datetime
from typing import Final

from attrs import define
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import ApiError, BudgetExceeded, RateLimited
from vllmproxy.ids import fresh_id
from vllmproxy.keys.gate import store_down
from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.interface import Limiter
from vllmproxy.limits.values import BUDGETS, Ask, Denied, Granted, Rule
from vllmproxy.relay.demand import NO_DEMAND, Demand, rules_of
from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)

#: Seconds between renewals of the leases of running requests: a third of a lease, so that two may fail.
RENEWAL = 15.0
#: Leases renewed in one call.
_BATCH = 500
#: Header lines of a limit of the whole key, in LiteLLM's names.
_LIMIT: Final = "x-ratelimit-api_key-limit-"
_REMAINING: Final = "x-ratelimit-api_key-remaining-"
#: Keys that are remembered as told of; who is forgotten is told of again.
_MOST_TOLD = 10_000


@define  # not frozen, which takes three times as long to make: there is one for each request
class Reservation:
    """What one request has taken.

    :ivar ask: what was asked for.
    :ivar request_id: the proxy's own, as the client's may come twice.
    :ivar remaining: for each rule, what was left; ``taken``: what was taken.
    :ivar demand: what it was for.
    :ivar day: on which a budget holds it, see :class:`~vllmproxy.limits.values.Granted`.
    """

    ask: Ask
    request_id: str
    remaining: tuple[int, ...]
    taken: tuple[int, ...]
    demand: Demand = NO_DEMAND
    day: int = 0

    @property
    def lines(self) -> bytes:
        """Header lines that tell the caller how much is left of the key's limits."""
        lines = ""
        for place, rule in enumerate(self.ask.rules):
            kind, left = rule.kind, self.remaining[place]
            if kind in ("requests", "tokens") and not rule.scope:
                lines += f"{_LIMIT}{kind}: {rule.limit}\r\n{_REMAINING}{kind}: {left}\r\n"
        return lines.encode("ascii")

    def held(self, kind: str) -> int:
        """Return what a budget holds for this request until its usage event is added."""
        amounts = zip(self.ask.rules, self.taken, strict=True)
        return next((taken for rule, taken in amounts if rule.kind == kind), 0)

    @property
    def period(self) -> int | None:
        """When the budget's period began that this was taken in; ``None`` without a budget."""
        return next((rule.period for rule in self.ask.rules if rule.kind in BUDGETS), None)

    def used_of_budget(self) -> int:
        """Return how much money is spent or held, this request's share included."""
        for rule, remaining in zip(self.ask.rules, self.remaining, strict=True):
            if rule.kind == "budget":
                return rule.limit - remaining
        return 0


class Quotas:
    """Takes from a limiter, gives back, and keeps the leases of running requests alive.

    :param budget_status: the HTTP status of a budget that is used up.
    """

    def __init__(self, limiter: Limiter, clock: IReactorTime, budget_status: int = 422) -> None:
        self._limiter = limiter
        self.budget_status = budget_status
        self._leases: dict[str, set[str]] = {}
        self._renewing = LoopingCall(self._renew)
        self._renewing.clock = clock
        self._clock = clock
        #: What each request's id begins with, which no other process has; and how many there were.
        self._id = fresh_id().decode("ascii")
        self._count = 0
        #: Keys that are over their soft budget, and the period that this was told in.
        self._told: dict[str, int | None] = {}

    def reserve(self, key: VirtualKey, demand: Demand = NO_DEMAND) -> Reservation | Deferred[Reservation] | None:
        """Take what ``demand`` costs ``key``; ``None`` where the key has no limits.

        Raises, or fails with, :class:`RateLimited`, :class:`BudgetExceeded`, and :class:`StoreDown` while nobody can
        count.
        """
        rules = rules_of(key, demand, self._clock.seconds())
        if not rules:
            return None
        # What is ahead is held of a budget by nobody: it is not to be told as used.
        self._count += 1
        ask = Ask(key.token, f"{self._id}{self._count}", rules, key.budget.soft is None)
        decision = self._limiter.reserve(ask)
        if isinstance(decision, Granted | Denied):
            return self._decided(decision, ask, key, demand)
        return decision.addCallbacks(self._decided, _cannot_count, callbackArgs=(ask, key, demand))

    def _decided(self, decision: Granted | Denied, ask: Ask, key: VirtualKey, demand: Demand) -> Reservation:
        if isinstance(decision, Denied):
            raise self._refusal(decision, ask, key)
        request_id = decision.request_id or ask.request_id
        if key.max_parallel_requests is not None:
            self._leases.setdefault(ask.key, set()).add(request_id)
            if not self._renewing.running:
                self._renewing.start(RENEWAL, now=False)
        reservation = Reservation(ask, request_id, decision.remaining, decision.taken, demand, decision.day)
        if key.budget.soft is not None:
            self._watch_soft_budget(key, reservation, key.budget.soft)
        return reservation

    def _watch_soft_budget(self, key: VirtualKey, reservation: Reservation, soft: int) -> None:
        """Tell, once in each period, that a key has used up what it was to be told of."""
        used, period = reservation.used_of_budget(), reservation.period
        if used <= soft or self._told.get(key.token) == period:
            return
        self._told[key.token] = period
        while len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        _log.warn(
            "Key {key_id} ({alias}) is over its soft budget: {used} of {soft} are spent or reserved",
            key_id=key.token,
            alias=key.key_alias,
            used=_money(used),
            soft=_money(soft),
        )

    def settle(
        self, reservation: Reservation, *, forwarded: bool, tokens: int | None = None, counted: bool = True
    ) -> None:
        """Give back what was not used: all of it, where the request was never forwarded.

        :param tokens: what the request has used, ``None`` where nobody knows: then the estimate counts.
        :param counted: whether there will be a usage event: until it is added, what is held of a budget stays held.
        """
        ask = reservation.ask
        held = self._leases.get(ask.key)
        if held is not None:
            held.discard(reservation.request_id)
            if not held:
                del self._leases[ask.key]
        costs: list[int | None] = []
        for place, rule in enumerate(ask.rules):
            if not forwarded or (rule.kind in BUDGETS and not counted):
                costs.append(0)
            elif rule.kind == "tokens":
                costs.append(min(reservation.taken[place], rule.cost) if tokens is None else tokens)
            else:
                costs.append(None)
        self._limiter.settle(ask.key, reservation.request_id, tuple(costs))

    def _refusal(self, denied: Denied, ask: Ask, key: VirtualKey) -> ApiError:
        rule = ask.rules[denied.rule]
        if rule.kind not in BUDGETS:
            return _rate_limited(denied, rule, ask.key)
        now = self._clock.seconds()
        _, ends = key.budget.period(now)
        message = f"Budget has been exceeded! {_amount(denied.left, rule)} of {_amount(rule.limit, rule)} are left"
        if denied.left or rule.needed > rule.limit:
            message += f", and this request may use {_amount(rule.needed, rule)}: ask for fewer tokens (max_tokens)"
        message += "."
        if ends is None or rule.needed > rule.limit:  # waiting does not help
            return BudgetExceeded(message, status=self.budget_status)
        headers = ((b"retry-after", b"%d" % max(math.ceil(ends - now), 1)), (b"reset_at", _time(ends).encode()))
        message += f" It begins anew at {_time(ends)}."
        return BudgetExceeded(message, status=self.budget_status, headers=headers)

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
        """Renew no more, and let what is being settled arrive."""
        if self._renewing.running:
            self._renewing.stop()
        await self._limiter.finish()


def _rate_limited(denied: Denied, rule: Rule, token: str) -> RateLimited:
    for_model = f" for model {rule.scope}" if rule.scope else ""
    message = (
        f"Rate limit exceeded for api_key: {token}{for_model}. Limit type: {rule.kind}. Current limit: {rule.limit}, "
        f"Remaining: {denied.left}. "
    )
    kind = (b"rate_limit_type", rule.kind.encode())
    if denied.never:  # no retry-after: waiting does not help
        return RateLimited(f"{message}This request may use {rule.needed}: ask for fewer (max_tokens).", headers=(kind,))
    reset_at = _time(denied.reset_at)
    if rule.kind == "tokens":
        message += f"This request may use {rule.needed}. "
    return RateLimited(
        f"{message}Limit resets at: {reset_at}",
        headers=(
            (b"retry-after", b"%d" % max(math.ceil(denied.retry_after), 1)),
            kind,
            (b"reset_at", reset_at.encode()),
        ),
    )


def _amount(amount: int, rule: Rule) -> str:
    return _money(amount) if rule.kind == "budget" else f"{amount} tokens"


def _money(micros: int) -> str:
    """Return an amount of money, given in millionths, without an exponent."""
    return f"{micros / 1e6:.6f}".rstrip("0").rstrip(".")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _cannot_count(reason: Failure) -> Failure:
    if reason.check(StoreUnavailable):
        raise store_down()
    return reason


def _not_renewed(reason: Failure) -> None:
    """The store is away; there are two more tries before a lease ends."""
    if reason.check(StoreUnavailable) is None:
        _log.failure("Renewing leases failed", reason)
