"""Lua scripts that Redis must not run too late.

A script sent to a Redis that was stopped runs when it goes on, after its caller was told that it failed. Hence
ARGV[1], the time on the server's clock, in microseconds, after which it does nothing. Every answer starts with what
happened, a number, and the time on the server's clock.
"""

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from vllmproxy.deadlines import Deadlines
from vllmproxy.limits.spans import micros
from vllmproxy.store.calls import is_late
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link, Wire

#: What happened: nothing.
LATE: Final = -1

#: What every such script begins with.
PUNCTUAL: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now > tonumber(ARGV[1]) then return {-1, now} end
"""

#: Seconds that a deadline may pass unseen.
_SLACK: Final = 0.005


class ScriptCall:
    """A script with what it is given.

    :param words: ARGV, but the first.
    :param not_after: on our clock.
    :ivar wire: the connection that it was sent over last.
    """

    __slots__ = ("_answered", "_clock", "_names", "_not_after", "_script", "_sent", "_words", "wire")

    def __init__(
        self, clock: IReactorTime, script: str, names: list[bytes], words: list[bytes], not_after: float
    ) -> None:
        self._clock = clock
        self._script = script
        self._names = names
        self._words = words
        self._not_after = not_after
        self._answered: Callable[[Any], None] | None = None
        self.wire: Wire | None = None

    def extend(self, not_after: float) -> None:
        """Let it do something until then, when it is sent again."""
        self._not_after = not_after

    def send(self, wire: Wire, answered: Callable[[Any], None]) -> None:
        """Have Redis run it. ``answered`` gets what it answers, or the ``RedisError`` that it failed with."""
        self.wire = wire
        self._answered = answered
        self._sent = self._clock.seconds()
        not_after = b"%d" % micros(self._not_after + wire.offset)
        wire.run(self._script, self._names, [not_after, *self._words], self._received)

    def _received(self, reply: Any) -> None:
        if isinstance(reply, list):
            # Clocks drift and are set: the server's showed that time after we sent and before we received.
            told, wire = reply[1] / 1e6, self.wire
            assert wire is not None
            wire.offset = min(max(wire.offset, told - self._clock.seconds()), told - self._sent)
        answered, self._answered = self._answered, None  # it leads back here, and is not to wait for the collector
        assert answered is not None
        answered(reply)


class _Run:
    """One call on its way to its answer."""

    __slots__ = ("_was_late", "call", "forgiven", "result", "scripts", "started")

    def __init__(self, scripts: "Scripts", call: ScriptCall, started: float) -> None:
        self.scripts = scripts
        self.call = call
        self.started = started
        self.result: Deferred[list[Any]] = Deferred(self._cancelled)
        self.forgiven = False
        self._was_late = False

    def send(self, wire: Wire) -> None:
        if not self.result.called:
            self.call.send(wire, self.answered)

    def answered(self, reply: Any) -> None:
        if self.result.called:
            return
        if not isinstance(reply, list):
            self.fail(StoreUnavailable(f"the Redis did not run the call: {reply}"))
        elif reply[0] != LATE:
            self.scripts.ended(self)
            self.result.callback(reply)
        elif self._was_late:
            self.fail(StoreUnavailable("the Redis ran the call too late"))
        else:
            # Yet we still wait for it: one of the two clocks was set, and we know now, or we were slow to send it.
            self._was_late = True
            self.scripts.extend(self)
            assert self.call.wire is not None
            self.call.send(self.call.wire, self.answered)

    def not_sent(self, reason: Failure) -> None:
        if not self.result.called:
            self.scripts.ended(self)
            self.result.errback(reason)

    def fail(self, error: StoreUnavailable) -> None:
        self.scripts.ended(self)
        self.result.errback(Failure(error))

    def _cancelled(self, _: "Deferred[list[Any]]") -> None:
        self.scripts.ended(self)


class Scripts:
    """Runs scripts over a connection.

    :param link: whoever made it opens and closes it.
    :param timeout: seconds that a call may take.
    """

    def __init__(self, link: Link, clock: IReactorTime, timeout: float) -> None:
        self._link = link
        self._clock = clock
        self._timeout = timeout
        self._running: Deadlines[_Run] = Deadlines(clock, timeout, self._late, slack=_SLACK)

    def call(self, script: str, names: list[bytes], words: list[bytes], seconds: float | None = None) -> ScriptCall:
        """Return a call that does nothing any more when ``seconds`` have passed, or else the timeout."""
        not_after = self._clock.seconds() + (self._timeout if seconds is None else seconds)
        return ScriptCall(self._clock, script, names, words, not_after)

    def run(self, call: ScriptCall) -> Deferred[list[Any]]:
        """Return the script's answer. Fails with :class:`StoreUnavailable`. A call that is cancelled or late leaves its
        place in the queue of replies."""
        run = _Run(self, call, self._clock.seconds())
        self._running.set(run)
        wire = self._link.ready
        if wire is not None:
            call.send(wire, run.answered)
        else:
            self._link.get().addCallbacks(run.send, run.not_sent)
        return run.result

    def ended(self, run: _Run) -> None:
        """It has its answer, or nobody waits for it any more."""
        self._running.clear(run)

    def extend(self, run: _Run) -> None:
        """Wait for it as long again."""
        run.call.extend(self._clock.seconds() + self._timeout)
        self._running.set(run)

    def end(self) -> None:
        """Fail every call under way: the store closes."""
        for run in list(self._running):
            run.fail(StoreUnavailable("the store was closed"))

    def _late(self, run: _Run) -> None:
        if not run.forgiven and is_late(self._clock, run.started + self._timeout):
            run.forgiven = True
            self._running.set(run)
            return
        self._link.late(run.call.wire, run.started)
        run.fail(StoreUnavailable(f"the store did not answer within {self._timeout:g} s"))
