"""The limits that several proxies share, in Redis (6.2 or newer) or Valkey.

What is kept, all of it but the account with a time to live, and all of a key under one hash tag::

    vllmproxy:{TOKEN}:clock                               steady time, see vllmproxy.limits.steady
    vllmproxy:{TOKEN}:requests:MODEL                      a window; no MODEL: of the whole key
    vllmproxy:{TOKEN}:tokens:MODEL                        a window
    vllmproxy:{TOKEN}:max_parallel_requests:MODEL         who holds a place
    vllmproxy:{TOKEN}:request:ID                          what was taken for a request
    vllmproxy:{TOKEN}:budget                              the account, for as long as there is the key
"""

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from txredisapi import RedisError

from vllmproxy.limits.spans import Spans, micros
from vllmproxy.limits.values import BUDGETS, BUSY_RETRY_AFTER, MAX_AMOUNT, Ask, Denied, DuplicateRequest, Granted
from vllmproxy.limits.window import bucket_width
from vllmproxy.store.calls import Calls
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_lua import DUPLICATE, GRANTED, LATE, RENEW, RESERVE, SETTLE
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.rows import name_bytes

#: Milliseconds that a time to live is longer than it must be: Redis counts it in milliseconds, and from its start.
_MARGIN = 1000


class RedisLimiter:
    """The :class:`~vllmproxy.limits.interface.Limiter` on a connection to Redis, one round trip a call.

    :param link: the connection; whoever made it opens and closes it.
    :param window: seconds of the sliding window; the same on all proxies that share a Redis, as is ``lease``.
    :param lease: seconds of a lease; renew it three times as often.
    :param timeout: seconds that a call may take.
    """

    def __init__(
        self, link: Link, clock: IReactorTime, *, window: float = 60.0, lease: float = 45.0, timeout: float = 0.25
    ) -> None:
        self._link = link
        self._clock = clock
        self._timeout = timeout
        self._spans = Spans.of(window, lease)
        self._kept = self._spans.kept // 1000 + _MARGIN
        width = bucket_width(self._spans.window)
        self._lengths = (self._spans.window, width, self._spans.lease, micros(BUSY_RETRY_AFTER), self._kept)
        self._calls = Calls(clock)

    def close(self) -> None:
        """Fail every call under way."""
        self._calls.end()

    def reserve(self, ask: Ask) -> Deferred[Granted | Denied]:
        return Deferred.fromCoroutine(self._reserve(ask))

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> Deferred[None]:
        return Deferred.fromCoroutine(self._settle(key, request_id, costs))

    def renew(self, key: str, request_ids: Sequence[str]) -> Deferred[list[str]]:
        return Deferred.fromCoroutine(self._renew(key, request_ids))

    async def _reserve(self, ask: Ask) -> Granted | Denied:
        if not ask.rules:
            return Granted(())
        names = [_name(ask.key, "clock"), _name(ask.key, "request", ask.request_id)]
        words: list[Any] = [name_bytes(ask.request_id), *self._lengths]
        for rule in ask.rules:
            names.append(account_name(ask.key) if rule.kind in BUDGETS else _name(ask.key, rule.kind, rule.scope))
            words += rule.kind, rule.limit, rule.cost, rule.period
        call = self._call(RESERVE, names, words, self._timeout)
        answered = False
        try:
            what, now, *rest = await self._run(call)
            answered = True
        finally:
            if not answered and call.wire is not None:
                self._undo(ask, call.wire)
        if what == DUPLICATE:
            raise DuplicateRequest
        if what == GRANTED:
            return Granted(tuple(rest))
        place, wait, never = rest
        return Denied(place, wait / 1e6, (now + wait) / 1e6, never=bool(never))

    async def _settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        await self._run(self._settlement(key, request_id, costs, self._timeout))

    async def _renew(self, key: str, request_ids: Sequence[str]) -> list[str]:
        if not request_ids:
            return []
        names = [_name(key, "clock"), *(_name(key, "request", request_id) for request_id in request_ids)]
        words = [self._spans.lease, self._kept, *map(name_bytes, request_ids)]
        _, _, *lost = await self._run(self._call(RENEW, names, words, self._timeout))
        return [request_ids[place] for place in lost]

    def _settlement(self, key: str, request_id: str, costs: tuple[int | None, ...], seconds: float) -> "_Call":
        used = ["" if cost is None else min(max(cost, 0), MAX_AMOUNT) for cost in costs]
        words = [name_bytes(request_id), self._spans.memory // 1000, *used]
        return self._call(SETTLE, [_name(key, "request", request_id)], words, seconds)

    def _call(self, script: str, names: list[bytes], words: list[Any], seconds: float) -> "_Call":
        return _Call(self._clock, script, names, words, self._clock.seconds() + seconds)

    def _undo(self, ask: Ask, wire: Wire) -> None:
        """Give back what a reservation may have taken whose answer nobody got; see :class:`Limiter`.

        Redis runs what comes over one connection in order. If that is lost nothing more can be done, and the
        reservation leaves by itself. The connection bounds the wait, for it is dropped when it stays mute.
        """
        call = self._settlement(ask.key, ask.request_id, (0,) * len(ask.rules), self._spans.kept / 1e6)
        Deferred.fromCoroutine(call.send(wire)).addErrback(lambda failure: failure.trap(RedisError))

    async def _run(self, call: "_Call") -> list[int]:
        """Return the script's answer. A call that is cancelled or late leaves its place in the queue of replies."""
        started = self._clock.seconds()

        async def exchange() -> list[int]:
            wire = await self._link.get()
            reply = await call.send(wire)
            if reply[0] == LATE:
                # Yet we still wait for it: one of the two clocks was set, and we know now.
                reply = await call.send(wire)
            if reply[0] == LATE:
                raise StoreUnavailable("the Redis ran the call too late")
            return reply

        def late() -> None:
            if call.wire is not None:
                call.wire.unanswered(started, self._clock.seconds())

        try:
            return await self._calls.run(Deferred.fromCoroutine(exchange()), self._timeout, late)
        except RedisError as error:
            raise StoreUnavailable(f"the Redis did not run the call: {error}") from error


class _Call:
    """A script with what it is given.

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

    async def send(self, wire: Wire) -> list[int]:
        """Have Redis run it: by name when this connection has run it before, and again in full if Redis forgot it."""
        self.wire = wire
        words = [micros(self._not_after + wire.offset), *self._words]
        sent = self._clock.seconds()
        reply: list[int] = await wire.eval(self._script, self._names, words)
        # Clocks drift and are set: the server's showed that time after we sent and before we received.
        told = reply[1] / 1e6
        wire.offset = min(max(wire.offset, told - self._clock.seconds()), told - sent)
        return reply


def _name(key: str, *parts: str) -> bytes:
    return b"vllmproxy:{%b}:%b" % (name_bytes(key), name_bytes(":".join(parts)))


def account_name(key: str) -> bytes:
    """Return where a key's account is kept."""
    return _name(key, "budget")
