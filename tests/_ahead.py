"""Reservations ahead in virtual time: an :class:`~vllmproxy.limits.ahead.Ahead` on a store that is somewhere else."""

from _limits import TOKEN, requests
from _shared import LATENCY, Shared, now
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock

from vllmproxy.limits.ahead import AHEAD, Ahead
from vllmproxy.limits.values import Ask, Denied, Granted, Rule

#: Far away, so that much may be ahead.
FAR = requests(10**6)
#: After so long without a request nothing is ahead any more: a quarter is slack, and what is given back travels twice.
LAPSED = 1.25 * AHEAD + 5 * LATENCY


class House:
    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_500_000_000)
        self.shared = Shared(self.clock)
        self.ahead = Ahead(self.shared, self.clock)
        self._ids = 0

    def ask(self, *rules: Rule) -> Deferred[Granted | Denied]:
        """Reserve for another request."""
        self._ids += 1
        return maybeDeferred(self.ahead.reserve, Ask(TOKEN, f"r{self._ids}", rules))

    def asked(self, *rules: Rule) -> Granted | Denied:
        """Reserve for another request, and let as much time pass as that takes."""
        asked = self.ask(*rules)
        if not asked.called:
            self.clock.advance(LATENCY)
        return now(asked)

    def warm(self, *rules: Rule) -> None:
        """Ask until some are ahead."""
        self.asked(*rules)
        self.asked(*rules)
        self.pass_by(3 * LATENCY)
        assert self.ready

    def ask_often(self, times: int, *rules: Rule) -> None:
        """Ask so often that many are ahead."""
        for _ in range(times):
            self.asked(*rules)
            self.clock.advance(LATENCY / 4)

    def take_all(self, *rules: Rule) -> None:
        """Have requests take what is ahead."""
        while self.ready:
            now(self.ask(*rules))

    def pass_by(self, seconds: float) -> None:
        for _ in range(round(seconds / LATENCY)):
            self.clock.advance(LATENCY)

    @property
    def ready(self) -> int:
        """How many are ahead."""
        stock = self.ahead._stocks.get(TOKEN)
        return 0 if stock is None else stock.here

    @property
    def counted(self) -> dict[tuple[str, str], int]:
        return self.shared.counted(TOKEN)

    def finish(self) -> list[None]:
        """Return what is not empty any more when that is over."""
        ended: list[None] = []
        Deferred.fromCoroutine(self.ahead.finish()).addCallback(ended.append)
        return ended

    def assert_nothing_is_left(self) -> None:
        behind = self.ahead._behind
        assert (self.ahead._stocks, list(self.ahead._untouched)) == ({}, [])
        assert (behind._due, behind._keys, behind._telling, behind._kept) == ([], set(), set(), [])
        assert self.shared.under_way == []
        assert self.clock.getDelayedCalls() == []
