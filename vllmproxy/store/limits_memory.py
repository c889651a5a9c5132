"""The limits of one process, in its memory; also those of a proxy whose keys are in SQLite."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from vllmproxy.limits.accounts import Accounts, has_budget
from vllmproxy.limits.leases import Leases
from vllmproxy.limits.spans import Spans, micros
from vllmproxy.limits.steady import Steady
from vllmproxy.limits.values import (
    BUDGETS,
    BUSY_RETRY_AFTER,
    MAX_AMOUNT,
    Ask,
    Denied,
    DuplicateRequest,
    Granted,
    Rule,
)
from vllmproxy.limits.window import Window
from vllmproxy.store.interface import Writes
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import NO_ACCOUNT, Account


class MemoryLimiter:
    """The :class:`~vllmproxy.limits.interface.Limiter` that answers at once and is gone with the process.

    What is kept of a key goes when nothing of it counts any more: when it has not been used for a window or a lease.
    Only the first request of a key with a budget waits: for the store to tell what the key has spent.

    :param window: seconds of the sliding window.
    :param lease: seconds of a lease; renew it three times as often.
    :param read_account: asks the store; left out, nothing was spent before.
    :ivar accounts: the store tells it what is added to them.
    """

    def __init__(
        self,
        clock: IReactorTime,
        *,
        window: float = 60.0,
        lease: float = 45.0,
        read_account: Callable[[str], Awaitable[Account]] | None = None,
    ) -> None:
        self._clock = clock
        self._spans = Spans.of(window, lease)
        self._steady = Steady()
        self._keys: Leases[_Counters] = Leases(self._spans.kept)
        self._read_account = read_account
        self.accounts = Accounts()

    def __len__(self) -> int:
        """The number of keys that something is kept of."""
        return self._keys.count(self._now())

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        if not ask.rules:
            return Granted(())
        if has_budget(ask) and ask.key not in self.accounts:
            return Deferred.fromCoroutine(self._reserve_first(ask))
        return self.reserve_now(ask)

    async def _reserve_first(self, ask: Ask) -> Granted | Denied:
        while ask.key not in self.accounts:
            changes = self.accounts.changes
            account = NO_ACCOUNT if self._read_account is None else await self._read_account(ask.key)
            if changes == self.accounts.changes:  # else it may have been read before the change, and told after it
                self.accounts.open(ask.key, account)
        return self.reserve_now(ask)

    def reserve_now(self, ask: Ask) -> Granted | Denied:
        """:meth:`reserve` for what needs no account, or one that is known here."""
        now = self._now()
        self._keys.count(now)
        counters = self._keys.get(now, ask.key) or _Counters(self._spans, self.accounts)
        denied = counters.check(now, ask, micros(self._clock.seconds()))
        if denied is not None:
            return denied
        self._keys.take(now, ask.key, counters)
        return counters.take(now, ask)

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        now = self._now()
        counters = self._keys.get(now, key)
        if counters is not None and counters.settle(now, request_id, costs):
            self._keys.renew(now, key)

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str]:
        now = self._now()
        counters = self._keys.get(now, key)
        if counters is None:
            return list(request_ids)
        lost = [request_id for request_id in request_ids if not counters.renew(now, request_id)]
        if len(lost) < len(request_ids):
            self._keys.renew(now, key)
        return lost

    async def finish(self) -> None:
        """All is told."""

    def _now(self) -> int:
        return self._steady.at(micros(self._clock.seconds()))


class MemoryLimiters:
    """The limiters of one store, which tells them what becomes of accounts."""

    def __init__(self, read_account: Callable[[str], Awaitable[Account]]) -> None:
        self._read_account = read_account
        self._made: list[MemoryLimiter] = []

    def make(self, clock: IReactorTime) -> MemoryLimiter:
        """Return another one."""
        limiter = MemoryLimiter(clock, read_account=self._read_account)
        self._made.append(limiter)
        return limiter

    def added(self, accounts: Mapping[str, Account], events: Sequence[UsageEvent] = ()) -> None:
        """``accounts`` were changed, to what they are now, as by ``events``."""
        for limiter in self._made:
            limiter.accounts.added(accounts, events)

    def changed(self, writes: Writes, spent: Mapping[str, Account]) -> None:
        """Keys were changed: where one is gone, or has another's account, what is known of it is not true any more.

        :param spent: the accounts that were set, as they are now.
        """
        for token in (*writes.remove, *writes.inherits):
            for limiter in self._made:
                limiter.accounts.forget(token)
        if spent:
            self.added(spent)


class _Counters:
    """What is kept of one key."""

    def __init__(self, spans: Spans, accounts: Accounts) -> None:
        self._spans = spans
        self._accounts = accounts
        self._windows: dict[tuple[str, str], Window] = {}
        self._places: dict[str, Leases[Ask]] = {}
        #: The requests that are not settled, and for each of their rules the bucket and what was taken.
        self._reserved: Leases[tuple[Ask, list[int], list[int]]] = Leases(spans.kept)
        self._settled: Leases[bool] = Leases(spans.memory)

    def check(self, now: int, ask: Ask, shown: int) -> Denied | None:
        """Return the refusal of the rule that takes the longest, ``None`` if there is room for all.

        :param shown: what the clock shows, while ``now`` is steady time.
        """
        if self._reserved.get(now, ask.request_id) or self._settled.get(now, ask.request_id):
            raise DuplicateRequest
        waits = [self._wait(now, ask.key, rule) for rule in ask.rules]
        longest = max(waits)
        if longest <= 0:
            return None
        never, place = longest == _NEVER, waits.index(longest)
        wait = self._spans.window if never else longest
        left = max(0, self._left(now, ask.key, ask.rules[place]))
        return Denied(place, wait / 1e6, (shown + wait) / 1e6, never=never, left=left)

    def take(self, now: int, ask: Ask) -> Granted:
        """Take all of it."""
        buckets, remaining, taken = [], [], []
        for rule in ask.rules:
            bucket, left = 0, self._left(now, ask.key, rule)
            amount = rule.taken(left)
            if rule.kind in BUDGETS:
                self._accounts.hold(ask.key, rule, amount)
            elif rule.kind == "max_parallel_requests":
                self._places_of(rule).take(now, ask.request_id, ask)
            else:
                bucket = self._window_of(rule).take(now, amount)
            buckets.append(bucket)
            taken.append(amount)
            remaining.append(max(0, left - amount))
        self._reserved.take(now, ask.request_id, (ask, buckets, taken))
        self._reserved.count(now)
        return Granted(tuple(remaining), tuple(taken))

    def _left(self, now: int, token: str, rule: Rule) -> int:
        if rule.kind in BUDGETS:
            return self._accounts.left(token, rule)
        if rule.kind == "max_parallel_requests":
            return rule.limit - self._places_of(rule).count(now)
        return rule.limit - self._window_of(rule).total

    def settle(self, now: int, request_id: str, costs: tuple[int | None, ...]) -> bool:
        """See :class:`~vllmproxy.limits.interface.Limiter`; false if there is nothing to settle."""
        reserved = self._reserved.get(now, request_id)
        if reserved is None:
            return False
        self._reserved.end(request_id)
        self._settled.take(now, request_id, True)
        self._settled.count(now)
        ask, buckets, taken = reserved
        every = zip(ask.rules, buckets, taken, costs + (None,) * len(buckets), strict=False)
        for rule, bucket, cost, used in every:
            if rule.kind == "max_parallel_requests":
                self._places_of(rule).end(request_id)
                continue
            if used is None:
                continue
            change = min(max(used, 0), MAX_AMOUNT) - cost
            if rule.kind in BUDGETS:
                self._accounts.settle(ask.key, rule, change)
            else:
                self._window_of(rule).settle(bucket, change)
        return True

    def renew(self, now: int, request_id: str) -> bool:
        """Renew the leases of a request; false if it has none."""
        reserved = self._reserved.get(now, request_id)
        if reserved is None:
            return False
        held = [self._places_of(rule) for rule in reserved[0].rules if rule.kind == "max_parallel_requests"]
        renewed = [places.renew(now, request_id) for places in held]
        return any(renewed) and self._reserved.renew(now, request_id)

    def _wait(self, now: int, token: str, rule: Rule) -> int:
        """Return how long it takes until there is room, in microseconds, or ``_NEVER``."""
        if rule.kind in BUDGETS:
            return 0 if rule.needed <= self._accounts.left(token, rule) else _NEVER
        if rule.kind != "max_parallel_requests":
            wait = self._window_of(rule).wait(now, rule.limit, rule.needed)
            return _NEVER if wait is None else wait
        if rule.limit == 0:
            return _NEVER
        return 0 if self._places_of(rule).count(now) < rule.limit else micros(BUSY_RETRY_AFTER)

    def _window_of(self, rule: Rule) -> Window:
        found = self._windows.get((rule.kind, rule.scope))
        if found is None:
            found = self._windows[rule.kind, rule.scope] = Window(self._spans.window)
        return found

    def _places_of(self, rule: Rule) -> Leases[Ask]:
        found = self._places.get(rule.scope)
        if found is None:
            found = self._places[rule.scope] = Leases(self._spans.lease)
        return found


#: Longer than any wait.
_NEVER = 2**62
