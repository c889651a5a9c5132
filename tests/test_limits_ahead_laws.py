"""Whatever happens to requests, settlements and the store: no limit is exceeded, and nothing is lost or left behind."""

from typing import Any

import pytest
from _limits import parallel, requests, tokens
from _shared import LATENCY, Shared
from attrs import define
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock

from vllmproxy.limits import behind
from vllmproxy.limits.ahead import AHEAD, Ahead
from vllmproxy.limits.values import Ask, Denied, Granted, Rule
from vllmproxy.store.interface import StoreUnavailable

KEYS = ("ab" * 32, "cd" * 32)
WINDOW = 10.0
#: Of each key: 70 requests, 70 of the model m, 3000 tokens, 66 at a time, a budget of 9000 tokens. So 2 may be ahead,
#: or 1, or none.
REQUESTS, TOKENS, PLACES, BUDGET = 70, 3000, 66, 9000


@pytest.fixture(autouse=True)
def nothing_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places have no end here but being given back, however long the store is away."""
    monkeypatch.setattr(behind, "MATTERS", 1e6)


def rules_of(kind: int, cost: int) -> tuple[Rule, ...]:
    """Return what a request of a kind asks for; the last but one is as after a change of the limits, for the better."""
    return (
        (requests(REQUESTS), tokens(TOKENS, cost), parallel(PLACES)),
        (requests(REQUESTS), requests(REQUESTS, scope="m"), parallel(PLACES)),
        (parallel(PLACES),),
        (requests(REQUESTS - 2), tokens(TOKENS, cost), parallel(PLACES)),
        (Rule("budget_tokens", "", BUDGET, cost), parallel(PLACES)),
    )[kind]


@define
class Admitted:
    """A request that runs, or did. ``used``: tokens, the estimate while it runs; ``held``: of the budget."""

    key: str
    id: str
    rules: tuple[Rule, ...]
    at: float
    used: int
    runs: bool = True
    proxy: int = 0
    held: int = 0


class World:
    """Proxies that share a store, and all that was let in."""

    def __init__(self, proxies: int, window: float) -> None:
        self.clock = Clock()
        self.clock.advance(1_500_000_000)
        self.window = window
        # Who renews is tried elsewhere: here places are kept until they are given back.
        self.shared = Shared(self.clock, window=window, lease=1e6)
        self.proxies = [Ahead(self.shared, self.clock) for _ in range(proxies)]
        self.admitted: list[Admitted] = []
        self.waiting: list[Deferred[Any]] = []
        self.outcomes: list[str] = []
        self.settled: set[str] = set()
        self._ids = 0

    def ask(self, proxy: int, key: str, kind: int, cost: int) -> None:
        self._ids += 1
        ask = Ask(key, f"r{self._ids}", rules_of(kind, cost))
        asked = maybeDeferred(self.proxies[proxy % len(self.proxies)].reserve, ask)
        self.waiting.append(asked)
        asked.addCallbacks(self._decided, self._failed, (ask, proxy % len(self.proxies)))
        asked.addBoth(lambda _: self.waiting.remove(asked))

    def _decided(self, decision: Granted | Denied, ask: Ask, proxy: int) -> None:
        self.outcomes.append(type(decision).__name__)
        if isinstance(decision, Granted):
            self.outcomes[-1] += " ahead" if decision.request_id else ""
            assert all(taken >= rule.cost for rule, taken in zip(ask.rules, decision.taken, strict=True))
            assert len(decision.remaining) == len(ask.rules)
            # One that was made for it is admitted by the store, another when it is taken.
            at = self.clock.seconds() if decision.request_id else self.shared.reserved_at[ask.request_id]
            assert at - self.shared.reserved_at[decision.request_id or ask.request_id] < AHEAD
            cost = sum(rule.cost for rule in ask.rules if rule.kind == "tokens")
            pairs = zip(ask.rules, decision.taken, strict=True)
            held = sum(taken for rule, taken in pairs if rule.kind == "budget_tokens")
            name = decision.request_id or ask.request_id
            self.admitted.append(Admitted(ask.key, name, ask.rules, at, cost or held, proxy=proxy, held=held))

    def _failed(self, reason: Any) -> None:
        reason.trap(StoreUnavailable)
        self.outcomes.append("unavailable")

    def settle(self, admitted: Admitted, part: float | None) -> None:
        """End it; it has used that part of its estimate, or nobody knows what."""
        admitted.runs = False
        if part is not None:
            admitted.used = int(admitted.used * part)
        costs = tuple(admitted.used if rule.kind == "tokens" else None for rule in admitted.rules)
        self.settled.add(admitted.id)
        self.proxies[admitted.proxy].settle(admitted.key, admitted.id, costs)
        if admitted.held:
            self.shared.spend(admitted.key, self.spent_of(admitted.key), admitted.held)

    def spent_of(self, key: str) -> int:
        """Return how many tokens of the budget were used by requests that are over."""
        return sum(each.used for each in self.admitted if each.key == key and each.held and not each.runs)

    def held_of(self, key: str) -> int:
        return sum(each.held for each in self.admitted if each.key == key and each.runs)

    def used_of(self, key: str) -> dict[tuple[str, str], int]:
        """Return what was let in, and what runs."""
        used: dict[tuple[str, str], int] = {}
        for each in self.admitted:
            for rule in each.rules if each.key == key else ():
                if rule.kind == "max_parallel_requests":
                    amount = int(each.runs)
                else:
                    amount = {"tokens": each.used, "budget_tokens": 0}.get(rule.kind, 1)
                if amount:
                    used[rule.kind, rule.scope] = used.get((rule.kind, rule.scope), 0) + amount
        return used

    def assert_that_no_place_is_taken_twice(self) -> None:
        for key in KEYS:
            assert self.used_of(key).get(("max_parallel_requests", ""), 0) <= PLACES

    def assert_that_no_window_has_more(self) -> None:
        for key in KEYS:
            times = sorted(each.at for each in self.admitted if each.key == key)
            for first in times:
                inside = [each for each in self.admitted if each.key == key and first <= each.at < first + self.window]
                for scope in ("", "m"):
                    limited = [
                        each for each in inside if any(r.kind == "requests" and r.scope == scope for r in each.rules)
                    ]
                    assert len(limited) <= REQUESTS
                assert sum(each.used for each in inside if not each.held) <= TOKENS

    def assert_that_no_budget_is_exceeded(self) -> None:
        for key in KEYS:
            assert self.spent_of(key) + self.held_of(key) <= self.shared.budget_tokens(key) <= BUDGET

    def end(self) -> None:
        """The store is there, all requests end, and nobody asks any more."""
        self.shared.mode = "up"
        while self.shared.under_way:  # who is refused may be asked for again
            self.shared.under_way[0].answer()
        for each in self.admitted:
            if each.runs:
                self.settle(each, None)
        self.clock.pump([LATENCY] * 50 + [0.05] * 60)

    def assert_nothing_is_left(self) -> None:
        assert self.waiting == []
        for proxy in self.proxies:
            behind = proxy._behind
            assert (proxy._stocks, list(proxy._untouched), proxy._asking) == ({}, [], {})
            assert (behind._due, behind._keys, behind._telling, behind._kept) == ([], set(), set(), [])
        assert self.shared.under_way == []
        assert self.clock.getDelayedCalls() == []


_ASK = st.tuples(
    st.just("ask"),
    st.integers(0, 2),
    st.sampled_from([KEYS[0], KEYS[0], KEYS[1]]),
    st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 4, 4]),
    st.sampled_from([1, 1, 1, 0, 3, 50, 700]),
    st.sampled_from([1, 2, 3, 5, 20, 50]),
    st.sampled_from([3 * LATENCY, LATENCY, 0.0]),
)
_SETTLE = st.tuples(st.just("settle"), st.integers(1, 60), st.sampled_from([None, 0.0, 0.5, 1.0]))
_STEPS = st.one_of(
    _ASK,
    _ASK,
    _ASK,
    _SETTLE,
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.001, 0.01, 0.2, 0.4, 0.5, 0.7])),
    st.tuples(st.just("mode"), st.sampled_from(["up", "up", "held", "away", "mute"])),
    st.tuples(st.sampled_from(["run", "answer", "fail"]), st.integers(0, 30)),
)
_LONG = st.tuples(st.just("pass"), st.sampled_from([3.0, WINDOW - 1, WINDOW - 0.2, WINDOW]))


def follow(steps: list[tuple[Any, ...]], proxies: int, window: float) -> World:
    world = World(proxies, window)
    for what, *rest in steps:
        if what == "ask":
            proxy, key, kind, cost, times, pause = rest
            for _ in range(times):
                world.ask(proxy, key, kind, cost)
                world.clock.advance(pause)
        elif what == "settle":
            for each in [each for each in world.admitted if each.runs][: rest[0]]:
                world.settle(each, rest[1])
        elif what == "pass":
            # Much happens at once when a process was not run for a while.
            world.clock.advance(rest[0])
        elif what == "mode":
            world.shared.mode = rest[0]
        elif world.shared.under_way:
            getattr(world.shared.under_way[rest[0] % len(world.shared.under_way)], what)()
        world.assert_that_no_place_is_taken_twice()
        world.assert_that_no_budget_is_exceeded()
    return world


@given(st.lists(_STEPS, min_size=10, max_size=40), st.integers(1, 3))
@settings(max_examples=200)
def test_what_counts_in_the_end_is_what_requests_took_and_nothing_else(steps: list[Any], proxies: int) -> None:
    world = follow(steps, proxies, 60.0)
    world.end()
    world.assert_nothing_is_left()
    ids = [each.id for each in world.admitted]
    assert len(set(ids)) == len(ids)
    assert len(world.shared.heard) == len(set(world.shared.heard))
    assert world.settled <= set(world.shared.heard)
    for key in KEYS:
        assert world.shared.counted(key) == world.used_of(key)
        assert world.shared.budget_tokens(key) == world.spent_of(key)


@given(st.lists(_STEPS | _LONG, min_size=10, max_size=40), st.integers(1, 3))
@settings(max_examples=200)
def test_no_limit_is_exceeded(steps: list[Any], proxies: int) -> None:
    world = follow(steps, proxies, WINDOW)
    world.assert_that_no_window_has_more()
    world.end()
    world.clock.pump([0.1] * round(10 * WINDOW + 10))
    assert {key: world.shared.counted(key) for key in KEYS} == {key: {} for key in KEYS}
    world.assert_nothing_is_left()
