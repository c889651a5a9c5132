"""Settlements on their way to a store that is not here: told together, and again while the store is away."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.limits.values import Ask, Denied, Granted, Lot, Rule
from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)

#: The settlement of one request: its key, its id, and what it did cost by each of its rules.
Settlement = tuple[str, str, tuple[int | None, ...]]

#: Settlements that could not be told, since when that is tried, and when it is again.
_Kept = tuple[Sequence[Settlement], float, float]

#: Seconds that one may wait for others, where nobody waits for what it gives back.
PAUSE: Final = 0.1
#: Seconds between tries while the store is away, for how long it matters, and how many calls are kept.
RETRY: Final = 1.0
MATTERS: Final = 60.0
#: Seconds for which it matters that something is given back whole: for so long at least a budget holds what nobody lets
#: go of; and between tries after a minute.
HELD: Final = 86_400.0
SELDOM: Final = 60.0
_MOST_KEPT: Final = 10_000
#: Calls that may be under way before what is prompt waits for one of them: who was given a place back here may ask for
#: one elsewhere.
_AT_A_TIME: Final = 4
#: The most that go together: a store does nothing else in that time.
_TOGETHER: Final = 256


class Shared(Protocol):
    """What a :class:`~vllmproxy.limits.interface.Limiter` asks that others ask as well.

    Its Deferreds end within their own deadline, and may fail with :class:`~vllmproxy.store.interface.StoreUnavailable`.
    Then nothing was taken, or it was given back, or, if the store cannot be told so, it leaves by itself: amounts when
    the window has passed, leases when theirs has, and what is held of a budget after the next day (UTC), or when its
    period is over.
    """

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        """Take from all of the ask's limits, or from none."""

    def reserve_ahead(self, key: str, rules: tuple[Rule, ...], name: str, count: int, ahead: float) -> Deferred[Lot]:
        """Take the same for each of ``count`` requests that may come within ``ahead`` seconds: what is taken counts so
        much longer. Return what was granted, maybe to fewer, or to none.

        :param name: of the lot; a new one, without a colon, as all other requests' ids.
        """

    def settle_all(self, settlements: Sequence[Settlement]) -> Deferred[None]:
        """Say what requests did cost, each as :meth:`~vllmproxy.limits.interface.Limiter.settle` does."""

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        """Let the leases of these requests last as long again, and return the ids that have none any more."""


class Behind:
    """Tells a limiter what requests did cost. Whoever settles need not wait, nor care whether the store is there.

    There are a few calls at a time, and what comes meanwhile goes together with the next one.
    """

    def __init__(self, limiter: Shared, clock: IReactorTime) -> None:
        self._limiter = limiter
        self._clock = clock
        self._due: list[Settlement] = []
        #: Whose they are.
        self._keys: set[str] = set()
        #: Whether something prompt waits for a call under way.
        self._is_hasty = False
        self._pause: IDelayedCall | None = None
        self._telling: set[Deferred[None]] = set()
        self._kept: list[_Kept] = []
        self._retrying = LoopingCall(self._retry)
        self._retrying.clock = clock
        self._closed = False

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...], *, prompt: bool) -> None:
        """Tell it, ``prompt`` or within :data:`PAUSE`."""
        self._due.append((key, request_id, costs))
        self._keys.add(key)
        if prompt:
            self._hurry()
        elif self._pause is None:
            self._pause = self._clock.callLater(PAUSE, self._paused)

    def give_back(self, key: str, lots: Iterable[Lot]) -> None:
        """Tell promptly that none of those come that might. They go together, also while the store is away."""
        unused = [(key, lot.take().request_id, (0,) * len(lot.taken)) for lot in lots for _ in range(lot.left)]
        if unused:
            self._due += unused
            self._keys.add(key)
            self._hurry()

    def _hurry(self) -> None:
        if len(self._telling) >= _AT_A_TIME:
            self._is_hasty = True
        else:
            self._tell_all()

    def tell(self, key: str) -> None:
        """Tell what is due for a key: somebody is about to ask for what it gives back."""
        if key in self._keys:
            self._tell_all()

    async def finish(self) -> None:
        """Tell all, and return when it has arrived; what does not arrive now ends by itself."""
        self._closed = True
        self._tell_all()
        if self._kept:
            self._retry()
        if self._retrying.running:
            self._retrying.stop()
        while self._telling:  # what was prompt meanwhile goes after these
            await DeferredList(list(self._telling))

    def _paused(self) -> None:
        self._pause = None
        self._tell_all()

    def _tell_all(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        due, self._due = self._due, []
        self._keys.clear()
        self._is_hasty = False
        while due:
            self._tell(due[:_TOGETHER], self._clock.seconds())
            due = due[_TOGETHER:]

    def _tell(self, settlements: Sequence[Settlement], since: float) -> None:
        told = self._limiter.settle_all(settlements)
        self._telling.add(told)
        told.addCallbacks(self._told, self._not_told, (told,), errbackArgs=(told, settlements, since))

    def _told(self, _: None, told: Deferred[None]) -> None:
        self._telling.discard(told)
        if self._is_hasty and len(self._telling) < _AT_A_TIME:
            self._tell_all()

    def _not_told(self, reason: Failure, told: Deferred[None], settlements: Sequence[Settlement], since: float) -> None:
        """The store is away: tell it again soon, as long as it matters. Only the first time counts."""
        self._told(None, told)
        if reason.check(StoreUnavailable) is None:
            _log.failure("Settling reservations failed", reason)
            return
        now = self._clock.seconds()
        is_old = now - since >= MATTERS
        if is_old:  # what gives something back whole
            settlements = [each for each in settlements if 0 in each[2]]
        if not settlements or now - since >= HELD or self._closed:
            return
        if len(self._kept) == _MOST_KEPT:
            _log.warn("The store is away: what {count} requests gave back is not kept for it", count=len(settlements))
            return
        self._kept.append((settlements, since, now + (SELDOM if is_old else 0)))
        if not self._retrying.running:
            self._retrying.start(RETRY, now=False)

    def _retry(self) -> None:
        kept, self._kept = self._kept, []
        now = self._clock.seconds()
        due = [each for each in kept if each[2] <= now or self._closed]
        self._kept = [each for each in kept if each[2] > now and not self._closed]
        for settlements, since in _joined(due):
            self._tell(settlements, since)
        if not kept:
            self._retrying.stop()


def _joined(kept: Sequence[_Kept]) -> Iterator[tuple[Sequence[Settlement], float]]:
    """Yield what could not be told, in fewer calls, and since when that is tried: a second more or less."""
    together: list[Settlement] = []
    first = 0.0
    for settlements, since, _ in kept:
        if together and (len(together) + len(settlements) > _TOGETHER or abs(since - first) > RETRY):
            yield together, first
            together = []
        if not together:
            first = since
        together += settlements
    if together:
        yield together, first
