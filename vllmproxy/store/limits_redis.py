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
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from txredisapi import RedisError

from vllmproxy.limits.spans import Spans, micros
from vllmproxy.limits.values import BUDGETS, BUSY_RETRY_AFTER, MAX_AMOUNT, Ask, Denied, DuplicateRequest, Granted
from vllmproxy.limits.window import bucket_width
from vllmproxy.store.calls import Calls
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_lua import DUPLICATE, GRANTED, RENEW, RESERVE, SETTLE
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.rows import name_bytes
from vllmproxy.store.scripts import ScriptCall, Scripts

#: Milliseconds that a time to live is longer than it must be: Redis counts it in milliseconds, and from its start.
_MARGIN = 1000
#: Seconds between tries to give back what was taken unheard, when the connection is lost; longer than a call may take.
_UNDO_SECONDS = 1.0


class RedisLimiter:
    """The :class:`~vllmproxy.limits.interface.Limiter` on a connection to Redis, one round trip a call.

    :param link: the connection; whoever made it opens and closes it.
    :param window: seconds of the sliding window; the same on all proxies that share a Redis, as is ``lease``.
    :param lease: seconds of a lease; renew it three times as often.
    :param timeout: seconds that a call may take.
    """

    def __init__(
        self, link: Link, clock: IReactorTime, *, window: float = 60.0, lease: float = 45.0, timeout: float = 0.2
    ) -> None:
        self._clock = clock
        self._spans = Spans.of(window, lease)
        self._kept = self._spans.kept // 1000 + _MARGIN
        width = bucket_width(self._spans.window)
        lengths = (self._spans.window, width, self._spans.lease, micros(BUSY_RETRY_AFTER), self._kept)
        self._lengths = b"%d %d %d %d %d" % lengths
        self._memory = b"%d" % (self._spans.memory // 1000)
        self._calls = Calls(clock)
        self._scripts = Scripts(link, clock, timeout)
        self._closed = False

    def close(self) -> None:
        """Fail every call under way."""
        self._closed = True
        self._calls.end()
        self._scripts.end()

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        if not ask.rules:
            return Granted(())
        key, id = name_bytes(ask.key), name_bytes(ask.request_id)
        names = [b"vllmproxy:{%b}:clock" % key, b"vllmproxy:{%b}:request:%b" % (key, id)]
        rules = [self._lengths]
        for rule in ask.rules:
            kind = rule.kind.encode()
            if rule.kind in BUDGETS:
                names.append(b"vllmproxy:{%b}:budget" % key)
            else:
                names.append(b"vllmproxy:{%b}:%b:%b" % (key, kind, name_bytes(rule.scope)))
            rules.append(b"%b %d %d %d %d" % (kind, rule.limit, rule.cost, rule.period, rule.needed))
        call = self._scripts.call(RESERVE, names, [id, b" ".join(rules)])
        decided: Deferred[Any] = self._scripts.run(call)
        return decided.addCallbacks(_decision, self._unheard, callbackArgs=(ask,), errbackArgs=(ask, call))

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> Deferred[None]:
        return self._scripts.run(self._settlement(key, request_id, costs)).addCallback(_nothing)

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        if not request_ids:
            return []
        names = [_name(key, "clock"), *(_name(key, "request", request_id) for request_id in request_ids)]
        words = [b"%d" % self._spans.lease, b"%d" % self._kept, *map(name_bytes, request_ids)]
        lost = self._scripts.run(self._scripts.call(RENEW, names, words))
        return lost.addCallback(lambda reply: [request_ids[place] for place in reply[2:]])

    def _settlement(
        self, key: str, request_id: str, costs: tuple[int | None, ...], seconds: float | None = None
    ) -> ScriptCall:
        used = [b"" if cost is None else b"%d" % min(max(cost, 0), MAX_AMOUNT) for cost in costs]
        words = [name_bytes(request_id), self._memory, *used]
        return self._scripts.call(SETTLE, [_name(key, "request", request_id)], words, seconds)

    def _unheard(self, failure: Failure, ask: Ask, call: ScriptCall) -> Failure:
        """Nobody heard the answer of a reservation, and nobody will."""
        if call.wire is not None:
            Deferred.fromCoroutine(self._undo(ask, call.wire))
        return failure

    async def _undo(self, ask: Ask, wire: Wire) -> None:
        """Give back what a reservation may have taken whose answer nobody got; see :class:`Limiter`.

        Redis runs what comes over one connection in order, and one that stays mute is dropped. If it is lost, what is
        held of a budget would not leave by itself: it is said over the next one, while Redis remembers the reservation.
        """
        costs, kept = (0,) * len(ask.rules), self._spans.kept / 1e6
        until = self._clock.seconds() + kept
        reply: Deferred[Any] = Deferred()
        self._settlement(ask.key, ask.request_id, costs, kept).send(wire, reply.callback)
        try:
            if not isinstance(await reply, RedisError):
                return
        except RedisError:
            pass
        while not self._closed and self._clock.seconds() < until:
            try:
                await self._calls.run(deferLater(self._clock, _UNDO_SECONDS), 2 * _UNDO_SECONDS)
                await self.settle(ask.key, ask.request_id, costs)
                return
            except StoreUnavailable:
                continue


def _decision(reply: list[int], ask: Ask) -> Granted | Denied:
    what, now, *rest = reply
    if what == DUPLICATE:
        raise DuplicateRequest
    if what == GRANTED:
        return Granted(tuple(rest[: len(ask.rules)]), tuple(rest[len(ask.rules) :]))
    place, wait, never, left = rest
    return Denied(place, wait / 1e6, (now + wait) / 1e6, never=bool(never), left=left)


def _nothing(_: list[Any]) -> None:
    """A settlement has no result."""


def _name(key: str, *parts: str) -> bytes:
    return b"vllmproxy:{%b}:%b" % (name_bytes(key), name_bytes(":".join(parts)))


def account_name(key: str) -> bytes:
    """Return where a key's account is kept."""
    return _name(key, "budget")
