"""The calls under way in a store: each has a deadline, and closing the store ends them all."""

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from vllmproxy.store.interface import StoreUnavailable

T = TypeVar("T")


class Calls:
    """Deferreds that somebody awaits. Who cancels one of them gets ``CancelledError``, as always."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._pending: set[Deferred[Any]] = set()

    def run(self, call: Deferred[T], seconds: float, late: Callable[[], None] | None = None) -> Deferred[T]:
        """Return ``call``; it fails with :class:`StoreUnavailable` when ``seconds`` pass or the store closes.

        :param late: called when the deadline passes, before the failure is delivered.
        """

        def passed(_: object, limit: float) -> T:
            if late is not None:
                late()
            raise StoreUnavailable(f"the store did not answer within {limit:g} s")

        def ended(result: T | Failure) -> T | Failure:
            if call in self._pending:
                self._pending.discard(call)
            elif isinstance(result, Failure) and isinstance(result.value, CancelledError):
                raise StoreUnavailable("the store was closed")
            return result

        self._pending.add(call)
        call.addTimeout(seconds, self._clock, passed)
        call.addBoth(ended)
        return call

    def end(self) -> None:
        """Fail every pending call: the store closes."""
        pending, self._pending = self._pending, set()
        for call in pending:
            call.cancel()
