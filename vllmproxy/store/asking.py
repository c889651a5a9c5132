"""What is asked of Redis on somebody's behalf: each call has a deadline, and closing the store ends them all."""

from typing import Any, Final, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from vllmproxy.deadlines import Deadlines
from vllmproxy.store.calls import is_late
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link, Wire

A = TypeVar("A", bound="Asking")
W = TypeVar("W")
T = TypeVar("T")

#: Seconds that a deadline may pass unseen.
_SLACK: Final = 0.005


class Asked(Generic[A, W, T]):
    """One call on its way to its answer, without a coroutine or a timer of its own.

    :param what: what is asked.
    :ivar result: who cancels it leaves its place in the queue of replies.
    :ivar wire: the connection that it was sent over.
    :ivar forgiven: this process came too late to its deadline to tell, and it was given another one.
    """

    __slots__ = ("asking", "forgiven", "result", "started", "what", "wire")

    def __init__(self, asking: A, what: W) -> None:
        self.asking = asking
        self.what = what
        self.started = asking.clock.seconds()
        self.wire: Wire | None = None
        self.forgiven = False
        self.result: Deferred[T] = Deferred(self._cancelled)

    def send(self, wire: Wire) -> None:
        """Ask over ``wire``, unless nobody waits any more."""
        raise NotImplementedError

    def not_sent(self, reason: Failure) -> None:
        """There is no connection."""
        if not self.result.called:
            self.asking.ended(self)
            self.result.errback(reason)

    def fail(self, error: StoreUnavailable) -> None:
        """Nobody is to wait for it any longer."""
        self.asking.ended(self)
        self.result.errback(Failure(error))

    def _cancelled(self, _: "Deferred[T]") -> None:
        self.asking.ended(self)


class Asking:
    """The calls under way.

    :param link: whoever made it opens and closes it.
    :param timeout: seconds that one may take.
    """

    def __init__(self, link: Link, clock: IReactorTime, timeout: float) -> None:
        self.clock = clock
        self._link = link
        self._timeout = timeout
        self._running: Deadlines[Asked[Any, Any, Any]] = Deadlines(clock, timeout, self._late, slack=_SLACK)

    def begin(self, asked: Asked[Any, Any, Any]) -> None:
        """Ask it, as soon as there is a connection."""
        self._running.set(asked)
        wire = self._link.ready
        if wire is not None:
            asked.send(wire)
        else:
            self._link.get().addCallbacks(asked.send, asked.not_sent)

    def ended(self, asked: Asked[Any, Any, Any]) -> None:
        """It has its answer, or nobody waits for it any more."""
        self._running.clear(asked)

    def end(self) -> None:
        """Fail every one under way: the store closes."""
        running = list(self._running)
        self._running.forget()
        for asked in running:
            asked.fail(StoreUnavailable("the store was closed"))

    def _late(self, asked: Asked[Any, Any, Any]) -> None:
        if not asked.forgiven and is_late(self.clock, asked.started + self._timeout):
            asked.forgiven = True
            self._running.set(asked)
            return
        self._link.late(asked.wire, asked.started)
        asked.fail(StoreUnavailable(f"the store did not answer within {self._timeout:g} s"))
