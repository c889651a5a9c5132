"""Many waits of one length at the cost of a dictionary entry each."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

T = TypeVar("T")

_log = Logger(namespace=__name__)


class Deadlines(Generic[T]):
    """Waits that all last ``seconds``: because they are equal, the oldest entry is always the next to expire,
    so one delayed call serves them all and setting a deadline costs no ``callLater``.

    An entry expires between ``seconds`` and ``seconds`` + ``slack`` (a quarter of it, at most 1 s) after
    :meth:`set`. Zero ``seconds`` switch the wait off.

    :param slack: the longest that it may be, in seconds.
    """

    def __init__(
        self, clock: IReactorTime, seconds: float, expired: Callable[[T], None], *, slack: float = 1.0
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._expired = expired
        self._due: dict[T, float] = {}
        self._call: IDelayedCall | None = None
        self._ticking = False
        self._most_slack = slack
        self._slack = min(seconds / 4, slack)

    def set(self, item: T) -> None:
        """Begin (or begin again) the wait of ``item``."""
        if not self._seconds:
            return
        self.clear(item)
        self._due[item] = self._clock.seconds() + self._seconds
        if self._call is None and not self._ticking:
            self._call = self._clock.callLater(self._seconds + self._slack, self._tick)

    def begin(self, item: T) -> bool:
        """Begin the wait of ``item``, and tell so, unless it waits already."""
        begins = item not in self._due
        if begins:
            self.set(item)
        return begins

    @property
    def seconds(self) -> float:
        """How long they last; 0 where they are switched off."""
        return self._seconds

    def __iter__(self) -> Iterator[T]:
        """Yield whose waits there are."""
        return iter(self._due)

    def clear(self, item: T) -> None:
        """End the wait of ``item``, if there is one."""
        if item in self._due:
            del self._due[item]

    def change(self, seconds: float) -> None:
        """Have every wait last ``seconds``, those under way too, each from when it began."""
        longer = seconds - self._seconds
        self._seconds = seconds
        self._slack = min(seconds / 4, self._most_slack)
        self._due = {item: due + longer for item, due in self._due.items()} if seconds else {}
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._due:
            first = next(iter(self._due.values())) - self._clock.seconds()
            self._call = self._clock.callLater(max(first, 0) + self._slack, self._tick)

    def pop_newest(self) -> tuple[T, bool] | None:
        """End the wait that was begun last, and return whose it was, and whether it was due; ``None`` where there is
        none."""
        if not self._due:
            return None
        item, due = self._due.popitem()
        return item, due <= self._clock.seconds()

    def longest(self, among: Callable[[T, float], bool] | None = None, *, looks: int = 1) -> tuple[float, T | None]:
        """Return for how many seconds the wait that is to expire first has lasted, and whose it is; -1 and ``None``
        where there is none.

        :param among: whose waits are meant, by that and how long they have lasted; all where it is ``None``.
        :param looks: how many are looked at.
        """
        began = self._clock.seconds() + self._seconds
        for item, due in islice(self._due.items(), looks):
            if among is None or among(item, began - due):
                return began - due, item
        return -1, None

    def close(self) -> None:
        """Forget every wait and those to come; nothing expires any more."""
        self._seconds = 0.0
        self.forget()

    def forget(self) -> None:
        """Forget every wait, and leave nothing on the clock until the next one."""
        self._due.clear()
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _tick(self) -> None:
        self._call = None
        self._ticking = True
        now = self._clock.seconds()
        while self._due:
            item, due = next(iter(self._due.items()))
            if due > now:
                self._call = self._clock.callLater(due - now + self._slack, self._tick)
                break
            del self._due[item]
            try:
                self._expired(item)
            except Exception:  # nothing is awaited here; one item's fault must not keep the others waiting
                _log.failure("Ending a wait failed")
        self._ticking = False
