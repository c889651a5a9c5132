"""Lua scripts that Redis must not run too late.

A script sent to a Redis that was stopped runs when it goes on, after its caller was told that it failed. Hence
ARGV[1], the time on the server's clock, in microseconds, after which it does nothing. Every answer starts with what
happened, a number, and the time on the server's clock.
"""

from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from txredisapi import RedisError

from vllmproxy.limits.spans import micros
from vllmproxy.store.calls import Calls
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


class ScriptCall:
    """A script with what it is given.

    :param words: ARGV, but the first.
    :param not_after: on our clock.
    :ivar wire: the connection that it was sent over last.
    """

    def __init__(
        self, clock: IReactorTime, script: str, names: list[bytes], words: list[Any], not_after: float
    ) -> None:
        self._clock = clock
        self._script = script
        self._names = names
        self._words = words
        self._not_after = not_after
        self.wire: Wire | None = None

    async def send(self, wire: Wire) -> list[Any]:
        """Have Redis run it: by name when this connection has run it before, and again in full if Redis forgot it."""
        self.wire = wire
        words = [micros(self._not_after + wire.offset), *self._words]
        sent = self._clock.seconds()
        reply: list[Any] = await wire.eval(self._script, self._names, words)
        # Clocks drift and are set: the server's showed that time after we sent and before we received.
        told = reply[1] / 1e6
        wire.offset = min(max(wire.offset, told - self._clock.seconds()), told - sent)
        return reply


class Scripts:
    """Runs scripts over a connection.

    :param link: whoever made it opens and closes it.
    :param calls: what is under way; whoever made it ends it.
    """

    def __init__(self, link: Link, clock: IReactorTime, calls: Calls) -> None:
        self._link = link
        self._clock = clock
        self._calls = calls

    def call(self, script: str, names: list[bytes], words: list[Any], seconds: float) -> ScriptCall:
        """Return a call that does nothing any more when ``seconds`` have passed."""
        return ScriptCall(self._clock, script, names, words, self._clock.seconds() + seconds)

    async def run(self, call: ScriptCall, seconds: float) -> list[Any]:
        """Return the script's answer. A call that is cancelled or late leaves its place in the queue of replies."""
        started = self._clock.seconds()

        async def exchange() -> list[Any]:
            wire = await self._link.get()
            reply = await call.send(wire)
            if reply[0] == LATE:
                # Yet we still wait for it: one of the two clocks was set, and we know now.
                reply = await call.send(wire)
            if reply[0] == LATE:
                raise StoreUnavailable("the Redis ran the call too late")
            return reply

        def late() -> None:
            self._link.late(call.wire, started)

        try:
            return await self._calls.run(Deferred.fromCoroutine(exchange()), seconds, late)
        except RedisError as error:
            raise StoreUnavailable(f"the Redis did not run the call: {error}") from error
