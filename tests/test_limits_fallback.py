"""Which limiter counts while the shared one comes and goes, in virtual time."""

from collections.abc import Sequence

import pytest
from _limits import TOKEN, parallel, requests, tokens
from _shared import now
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import Clock

from vllmproxy.limits.fallback import FallbackLimiter
from vllmproxy.limits.values import MAX_AMOUNT, Ask, Denied, Granted, Rule
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_memory import MemoryLimiter


class Shared:
    """A limiter as Redis's: it answers by Deferreds, and is away when the test says so."""

    def __init__(self, clock: Clock) -> None:
        self._limiter = MemoryLimiter(clock)
        self.away = False
        self.settled: list[str] = []
        self.renewed: list[str] = []

    def reserve(self, ask: Ask) -> Deferred[Granted | Denied]:
        return maybeDeferred(self._do, self._limiter.reserve, ask)

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        self.settled.append(request_id)
        self._limiter.settle(key, request_id, costs)

    async def finish(self) -> None:
        self.settled.append("finished")

    def renew(self, key: str, request_ids: Sequence[str]) -> Deferred[list[str]]:
        self.renewed += request_ids
        return maybeDeferred(self._do, self._limiter.renew, key, request_ids)

    def _do(self, what, *arguments):  # type: ignore[no-untyped-def]
        if self.away:
            raise StoreUnavailable("away")
        return what(*arguments)


class House:
    def __init__(self, share: float = 0.5) -> None:
        self.clock = Clock()
        self.clock.advance(1_500_000_000)
        self.shared = Shared(self.clock)
        self.limiter = FallbackLimiter(self.shared, MemoryLimiter(self.clock), share)
        self._ids = 0

    def reserve(self, *rules: Rule, id: str | None = None) -> Granted | Denied:
        self._ids += 1
        return now(maybeDeferred(self.limiter.reserve, Ask(TOKEN, id or f"r{self._ids}", rules)))

    def settle(self, id: str, *costs: int | None) -> None:
        self.limiter.settle(TOKEN, id, costs)

    def renew(self, *ids: str) -> list[str]:
        return now(maybeDeferred(self.limiter.renew, TOKEN, ids))


def test_the_shared_one_counts_while_it_answers() -> None:
    house = House()
    assert [house.reserve(requests(2)) for _ in range(2)] == [Granted((1,)), Granted((0,))]
    assert isinstance(house.reserve(requests(2)), Denied)


def test_while_it_is_away_a_share_is_counted_here() -> None:
    house = House()
    house.shared.away = True
    assert [house.reserve(requests(5)) for _ in range(2)] == [Granted((1,)), Granted((0,))]
    denied = house.reserve(requests(5))
    assert isinstance(denied, Denied)
    assert (denied.retry_after, denied.never) == (60.0, False)
    house.clock.advance(60)
    assert isinstance(house.reserve(requests(5)), Granted)


def test_it_goes_back_as_soon_as_the_shared_one_answers() -> None:
    house = House()
    house.shared.away = True
    assert house.reserve(requests(4)) == Granted((1,))
    house.shared.away = False
    assert house.reserve(requests(4)) == Granted((3,))
    house.shared.away = True
    assert house.reserve(requests(4)) == Granted((0,))


def test_what_was_taken_is_settled_and_renewed_where_it_was_taken() -> None:
    house = House()
    house.reserve(parallel(2), tokens(100, 10), id="there")
    house.shared.away = True
    house.reserve(parallel(2), tokens(100, 10), id="here")
    assert isinstance(house.reserve(parallel(2)), Denied)
    house.shared.away = False
    for _ in range(4):
        house.clock.advance(15)
        assert house.renew("there", "here") == []
    assert house.shared.renewed == ["there"] * 4
    house.settle("here", None, 0)
    house.settle("there", None, 0)
    assert house.shared.settled == ["there"]
    assert house.renew("there", "here") == ["there", "here"]  # neither is held any more
    house.shared.away = True
    assert house.reserve(parallel(2), tokens(100, 10)) == Granted((0, 40))
    house.settle("there")
    assert house.shared.settled == ["there", "there"]
    now(Deferred.fromCoroutine(house.limiter.finish()))
    assert house.shared.settled[2:] == ["finished"]


def test_renewing_what_is_here_needs_nobody_else() -> None:
    house = House()
    house.shared.away = True
    house.reserve(parallel(2), id="here")
    assert house.renew("here") == []
    with pytest.raises(StoreUnavailable):
        house.renew("here", "there")


def test_nothing_is_remembered_of_what_is_over() -> None:
    house = House()
    house.shared.away = True
    for number in range(100):
        house.reserve(requests(200), parallel(2), id=f"r{number}")
        house.settle(f"r{number}", None, None)
    assert house.limiter._here == set()


def test_what_is_not_for_one_proxy_to_count_fails_closed() -> None:
    house = House()
    house.shared.away = True
    budget = evolve(requests(10), kind="budget")  # type: ignore[arg-type]  # a kind that may be added
    for rules in ((budget,), (requests(10), budget)):
        with pytest.raises(StoreUnavailable):
            house.reserve(*rules)
    assert isinstance(house.reserve(requests(10)), Granted)


def test_more_than_the_share_and_not_than_the_limit_is_no_refusal_for_ever() -> None:
    house = House()
    house.shared.away = True
    with pytest.raises(StoreUnavailable):
        house.reserve(tokens(100, 60))
    never = house.reserve(tokens(100, 101))
    assert isinstance(never, Denied)
    assert never.never


def test_a_fault_or_a_cancelled_call_is_no_outage() -> None:
    house = House()

    def faulty(ask: Ask) -> Deferred[Granted | Denied]:
        return maybeDeferred(lambda: Granted((1 // 0,)))

    house.shared.reserve = faulty  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        house.reserve(requests(1))
    waiting: Deferred[Granted | Denied] = Deferred()
    house.shared.reserve = lambda ask: waiting  # type: ignore[method-assign]
    asked = house.limiter.reserve(Ask(TOKEN, "gone", (requests(1),)))
    assert isinstance(asked, Deferred)
    asked.cancel()
    with pytest.raises(CancelledError):
        now(asked)
    assert house.limiter._here == set()


def test_one_that_answers_at_once_is_taken_at_its_word() -> None:
    clock = Clock()
    limiter = FallbackLimiter(MemoryLimiter(clock), MemoryLimiter(clock), 0.5)
    assert limiter.reserve(Ask(TOKEN, "r", (requests(9), parallel(2)))) == Granted((8, 1))
    assert limiter.renew(TOKEN, ["r"]) == []
    limiter.settle(TOKEN, "r", ())
    assert limiter.renew(TOKEN, ["r"]) == ["r"]


@given(st.integers(0, MAX_AMOUNT), st.floats(0, 1, exclude_min=True))
def test_a_share_is_some_of_it_and_never_more(limit: int, share: float) -> None:
    house = House(share)
    part = house.limiter._part(requests(limit)).limit
    assert min(limit, 1) <= part <= limit
    assert abs(part - limit * share) <= 1
