"""A limiter that is somewhere else, in virtual time: the test says what becomes of each call."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from vllmproxy.limits.behind import Settlement
from vllmproxy.limits.leases import Leases
from vllmproxy.limits.spans import Spans, micros
from vllmproxy.limits.values import MAX_AMOUNT, Ask, Denied, Granted, Lot, Rule
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_memory import MemoryLimiter
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import NO_ACCOUNT, Account

T = TypeVar("T")

#: Seconds that a call may take, and that one takes while all is well.
DEADLINE = 0.2
LATENCY = 0.001


class Call:
    """One call on its way. The store does it when it is :meth:`run`; who called hears of that when it is answered.

    :ivar what: ``reserve``, ``ahead``, ``settle`` or ``renew``; of which requests.
    """

    def __init__(self, shared: "Shared", what: str, key: str, ids: Sequence[str], do: Callable[[], Any]) -> None:
        self.what, self.key, self.ids = what, key, list(ids)
        self._shared = shared
        self._do = do
        self._outcome: Any = None
        self._has_run = False
        self.result: Deferred[Any] = Deferred(self._cancelled)
        self._deadline = shared.clock.callLater(DEADLINE, self.fail)
        shared.under_way.append(self)

    def run(self) -> None:
        if not self._has_run:
            self._has_run = True
            self._outcome = self._do()

    def answer(self) -> None:
        if self in self._shared.under_way:
            self.run()
            self._end()
            if self.what == "settle":
                self._shared.heard += self.ids
            self.result.callback(self._outcome)

    def fail(self, error: Exception | None = None) -> None:
        if self in self._shared.under_way:
            self._end()
            self._give_back()
            self.result.errback(error or StoreUnavailable("away"))

    def _cancelled(self, _: Deferred[Any]) -> None:
        self._end()
        self._give_back()

    def _end(self) -> None:
        self._shared.under_way.remove(self)
        if self._deadline.active():
            self._deadline.cancel()

    def _give_back(self) -> None:
        """What a reservation took that nobody heard of is taken back."""
        if self._has_run and self.what in ("reserve", "ahead"):
            for request_id in self.ids:
                self._shared.settle_now(self.key, request_id, (0,) * 9)


class Shared:
    """The :class:`~vllmproxy.limits.behind.Shared` that counts in memory, far away.

    :ivar mode: ``up``: a call is answered in :data:`LATENCY`. ``held``: the test does it, or the deadline. ``away``: it
        fails at once. ``mute``: it is run and nobody hears of it.
    :ivar asked: all calls, in order: ``what``, key and ids. :ivar under_way: those without an answer.
    :ivar heard: the ids whose settlement was answered. :ivar reserved_at: when the store reserved, for each id.
    """

    def __init__(self, clock: Clock, **options: float) -> None:
        self.clock = clock
        self.mode = "up"
        self.asked: list[tuple[str, str, list[str]]] = []
        self.under_way: list[Call] = []
        self.heard: list[str] = []
        self.reserved_at: dict[str, float] = {}
        self.costs: dict[str, tuple[int | None, ...]] = {}
        self._until: dict[tuple[str, tuple[str, str]], int] = {}
        self._limiter = MemoryLimiter(clock, **options)
        spans = Spans.of(options.get("window", 60.0), options.get("lease", 45.0))
        self._limiter._keys = Leases(spans.kept + 1_000_000)  # what is ahead counts so much longer

    def reserve(self, ask: Ask) -> Deferred[Granted | Denied]:
        return self._call("reserve", ask.key, [ask.request_id], lambda: self._reserve_now(ask))

    def reserve_ahead(self, key: str, rules: tuple[Rule, ...], name: str, count: int, ahead: float) -> Deferred[Lot]:
        assert count
        request_ids = [f"{name}:{number}" for number in range(count)]
        return self._call("ahead", key, request_ids, lambda: self._ahead(key, rules, name, request_ids, ahead))

    def settle_all(self, settlements: Sequence[Settlement]) -> Deferred[None]:
        ids = [request_id for _, request_id, _ in settlements]
        return self._call("settle", settlements[0][0], ids, lambda: self._settle_all(settlements))

    def renew(self, key: str, request_ids: Sequence[str]) -> Deferred[list[str]]:
        return self._call("renew", key, request_ids, lambda: self._limiter.renew(key, request_ids))

    def settle_now(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        self._limiter.settle(key, request_id, costs)

    def counted(self, key: str) -> dict[tuple[str, str], int]:
        """Return what counts of each of a key's limits just now, by kind and scope, where that is not 0."""
        now = self._limiter._now()
        counters = self._limiter._keys.get(now, key)
        if counters is None:
            return {}
        found = {}
        for name, window in counters._windows.items():
            window.prune(now)
            found[name] = window.total
        for scope, places in counters._places.items():
            found["max_parallel_requests", scope] = places.count(now)
        return {name: amount for name, amount in found.items() if amount}

    def budget_tokens(self, key: str) -> int:
        """Return how many tokens of a key's budget are spent or held."""
        if key not in self._limiter.accounts:
            return 0
        rule = Rule("budget_tokens", "", MAX_AMOUNT, 0)
        return MAX_AMOUNT - self._limiter.accounts.left(key, rule)

    def spend(self, key: str, spent: int, held: int) -> None:
        """A request's usage is added: so many tokens are spent by now, and it holds no more."""
        event = UsageEvent(time=self.clock.seconds(), key=key, held_tokens=held)
        self._limiter.accounts.added({key: Account(0, 0, spent)}, [event])

    def of(self, what: str) -> list[list[str]]:
        """Return the ids of all calls of a kind."""
        return [ids for each, _, ids in self.asked if each == what]

    def _call(self, what: str, key: str, ids: Sequence[str], do: Callable[[], Any]) -> Deferred[Any]:
        self.asked.append((what, key, list(ids)))
        call = Call(self, what, key, ids, do)
        if self.mode == "up":
            self.clock.callLater(LATENCY, call.answer)
        elif self.mode == "away":
            call.fail()
        elif self.mode == "mute":
            call.run()
        return call.result

    def _reserve_now(self, ask: Ask) -> Granted | Denied:
        if ask.key not in self._limiter.accounts:
            self._limiter.accounts.open(ask.key, NO_ACCOUNT)
        decision = self._limiter.reserve_now(ask)
        self._count_longer(ask.key)
        if isinstance(decision, Granted):
            self.reserved_at[ask.request_id] = self.clock.seconds()
        return decision

    def _ahead(self, key: str, rules: tuple[Rule, ...], name: str, request_ids: Sequence[str], ahead: float) -> Lot:
        lot = Lot(name, 0)
        for request_id in request_ids:
            decision = self._reserve_now(Ask(key, request_id, rules))
            if isinstance(decision, Denied):
                break
            lot = Lot(name, lot.granted + 1, decision.remaining, decision.taken, decision.day)
            self._begin_longer(key, ahead)
        return lot

    def _begin_longer(self, key: str, ahead: float) -> None:
        now = self._limiter._now()
        counters = self._limiter._keys.get(now, key)
        assert counters is not None
        for name, window in counters._windows.items():
            window.take(now, 0)
            self._until[key, name] = max(self._until.get((key, name), 0), now + micros(ahead))
        self._count_longer(key)

    def _count_longer(self, key: str) -> None:
        """What is in a window's newest bucket may still be asked for until then, whatever was taken since."""
        counters = self._limiter._keys.get(self._limiter._now(), key)
        for name, window in () if counters is None else counters._windows.items():
            if window._buckets:
                window._buckets[-1][0] = max(window._buckets[-1][0], self._until.get((key, name), 0))

    def _settle_all(self, settlements: Sequence[Settlement]) -> None:
        for key, request_id, costs in settlements:
            self.costs.setdefault(request_id, costs)
            self._limiter.settle(key, request_id, costs)


def now(answer: Deferred[T]) -> T:
    """Return what has come of ``answer`` by now, or raise it."""
    results: list[T] = []
    failures: list[BaseException] = []
    answer.addCallbacks(results.append, lambda failure: failures.append(failure.value))
    for error in failures:
        raise error
    return results[0]
