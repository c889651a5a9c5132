"""Lua scripts that Redis must not run too late.

A script sent to a Redis that was stopped runs when it goes on, after its caller was told that it failed. Hence
ARGV[1], the time on the server's clock, in microseconds, after which it does nothing. Every answer starts with what
happened, a number, and the time on the server's clock.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha1
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from txredisapi import ResponseError

from vllmproxy.limits.spans import micros
from vllmproxy.store.asking import Asked, Asking
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Wire

#: What happened: nothing.
LATE: Final = -1

#: What every such script begins with.
PUNCTUAL: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now > tonumber(ARGV[1]) then return {-1, now} end
"""


class ScriptCall:
    """A script with what it is given. Redis runs it by its name where the connection has run it before, and in full if
    it has forgotten it.

    txredisapi's ``eval`` takes several Deferreds for that, and converts each word.

    :param words: ARGV, but the first.
    :param not_after: on our clock.
    :ivar wire: the connection that it was sent over last.
    :ivar is_extended: it was given longer once.
    """

    __slots__ = (
        "_answered",
        "_by_name",
        "_clock",
        "_names",
        "_not_after",
        "_script",
        "_sent",
        "_words",
        "is_extended",
        "wire",
    )

    def __init__(
        self, clock: IReactorTime, script: str, names: list[bytes], words: list[bytes], not_after: float
    ) -> None:
        self._clock = clock
        self._script = script
        self._names = names
        self._words = words
        self._not_after = not_after
        self._answered: Callable[[Any], None] | None = None
        self._by_name = False
        self.is_extended = False
        self.wire: Wire | None = None

    def extend(self, not_after: float) -> None:
        """Let it do something until then, when it is sent again."""
        self._not_after = not_after
        self.is_extended = True

    def send(self, wire: Wire, answered: Callable[[Any], None]) -> None:
        """Have Redis run it. ``answered`` gets what it answers, or the ``RedisError`` that it failed with."""
        self.wire = wire
        self._answered = answered
        self._sent = self._clock.seconds()
        self._by_name = self._script in wire.has_run
        how = (b"EVALSHA", _name_of(self._script)) if self._by_name else (b"EVAL", self._script.encode())
        not_after = b"%d" % micros(self._not_after + wire.offset)
        wire.ask((*how, len(self._names), *self._names, not_after, *self._words), self._received, now=True)

    def _received(self, reply: Any) -> None:
        wire = self.wire
        assert wire is not None
        if isinstance(reply, list):
            wire.has_run.add(self._script)
            # Clocks drift and are set: the server's showed that time after we sent and before we received.
            told = reply[1] / 1e6
            wire.offset = min(max(wire.offset, told - self._clock.seconds()), told - self._sent)
        answered, self._answered = self._answered, None  # it leads back here, and is not to wait for the collector
        assert answered is not None
        if self._by_name and isinstance(reply, ResponseError) and str(reply).startswith("NOSCRIPT"):
            wire.has_run.discard(self._script)
            self.send(wire, answered)
            return
        answered(reply)


class _Run(Asked["Scripts", ScriptCall, list[Any]]):
    """One script on its way to its answer."""

    __slots__ = ()

    def send(self, wire: Wire) -> None:
        if not self.result.called:
            self.wire = wire
            self.what.send(wire, self._answered)

    def _answered(self, reply: Any) -> None:
        if self.result.called:
            return
        if not isinstance(reply, list):
            self.fail(StoreUnavailable(f"the Redis did not run the call: {reply}"))
        elif reply[0] != LATE:
            self.asking.ended(self)
            self.result.callback(reply)
        elif self.what.is_extended:
            self.fail(StoreUnavailable("the Redis ran the call too late"))
        else:
            # Yet we still wait for it: one of the two clocks was set, and we know now, or we were slow to send it.
            self.asking.extend(self)
            assert self.wire is not None
            self.send(self.wire)


class Scripts(Asking):
    """Runs scripts over a connection."""

    def call(self, script: str, names: list[bytes], words: list[bytes], seconds: float | None = None) -> ScriptCall:
        """Return a call that does nothing any more when ``seconds`` have passed, or else the timeout."""
        not_after = self.clock.seconds() + (self._timeout if seconds is None else seconds)
        return ScriptCall(self.clock, script, names, words, not_after)

    def run(self, call: ScriptCall) -> Deferred[list[Any]]:
        """Return the script's answer. Fails with :class:`StoreUnavailable`."""
        run = _Run(self, call)
        self.begin(run)
        return run.result

    def extend(self, run: _Run) -> None:
        """Wait for it as long again."""
        run.what.extend(self.clock.seconds() + self._timeout)
        self._running.set(run)


@cache
def _name_of(script: str) -> bytes:
    return sha1(script.encode(), usedforsecurity=False).hexdigest().encode()
