"""The calls under way in a store: each has a deadline, and closing the store ends them all."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from vllmproxy.store.interface import StoreUnavailable

T = TypeVar("T")

#: Seconds that a turn of the reactor takes when it has much to do, and no longer.
LAG: Final = 0.03


class Calls:
    """Deferreds that somebody awaits. Who cancels one of them gets ``CancelledError``, as always."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._pending: set[Deferred[Any]] = set()

    def run(self, call: Deferred[T], seconds: float, late: Callable[[], None] | None = None) -> Deferred[T]:
        """Return ``call``; it fails with :class:`StoreUnavailable` when ``seconds`` pass or the store closes.

        :param late: called when the deadline passes, before the failure is delivered.
        """

        timer: IDelayedCall
        expired = forgiven = False
        due = self._clock.seconds() + seconds

        def passed() -> None:
            nonlocal due, expired, forgiven, timer
            if not forgiven and is_late(self._clock, due):
                forgiven, due = True, self._clock.seconds() + seconds
                timer = self._clock.callLater(seconds, passed)
                return
            if late is not None:
                late()
            expired = True
            call.cancel()

        def ended(result: T | Failure) -> T | Failure:
            if timer.active():
                timer.cancel()
            was_pending = call in self._pending
            self._pending.discard(call)
            if isinstance(result, Failure) and isinstance(result.value, CancelledError):
                if expired:
                    raise StoreUnavailable(f"the store did not answer within {seconds:g} s")
                if not was_pending:
                    raise StoreUnavailable("the store was closed")
            return result

        self._pending.add(call)
        timer = self._clock.callLater(seconds, passed)
        call.addBoth(ended)
        return call

    def end(self) -> None:
        """Fail every pending call: the store closes."""
        pending, self._pending = self._pending, set()
        for call in pending:
            call.cancel()


def is_late(clock: IReactorTime, due: float) -> bool:
    """Tell whether this process comes to a deadline so late that it was too busy to see whether the store had answered:
    then that says nothing of the store, and is given once more."""
    return clock.seconds() - due > LAG
