"""Load for ``compare.py``: requests and streams over connections that stay open, with as little work as Python allows.

Each request is given as bytes and written at once; of an answer no more is read than where it ends.
"""

import asyncio
import ctypes
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from _canned import SMALL
from _processes import Meter, Used
from _running import HOST
from attrs import frozen

#: How the small answer ends, and the piece by which a streamed event is known.
_END = SMALL[-24:]
_EVENT = b"data: "
_STAMP = b'"content":"'
#: Seconds before anything is measured.
_WARM = 0.5


class BadAnswer(Exception):
    """A contestant answered something else than 200, or broke off; there is nothing to measure."""


class Call(asyncio.Protocol):
    """One connection. :meth:`ask` writes the request, ``finished`` is called when its whole answer is here.

    :ivar began: when it was asked, in ``time.monotonic_ns()``.
    """

    def __init__(self, request: bytes, finished: "Callable[[Call], None]", failed: Callable[[Exception], None]) -> None:
        self.request = request
        self.finished = finished
        self._failed = failed
        self._rest = b""
        self.began = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._descriptor = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        self._descriptor = -1  # the number may soon be another connection's
        self._failed(BadAnswer(f"the connection was closed ({exc or 'without an error'})"))

    def ask(self) -> None:
        """Send the request; the answer to the one before has to be here."""
        self.began = time.monotonic_ns()
        try:
            os.write(self._descriptor, self.request)
        except OSError as error:
            self._failed(BadAnswer(f"nothing could be sent ({error})"))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        if data.endswith(_END) or _is_whole(data):
            self._rest = b""
            if data.startswith(b"HTTP/1.1 200"):
                self.finished(self)
            else:
                self._failed(_bad(data))
        else:
            self._rest = data


def _bad(answer: bytes) -> BadAnswer:
    """Return the status line and the body, as far as it is here."""
    head, _, body = answer.decode("latin-1").partition("\r\n\r\n")
    return BadAnswer(f"{head.partition(chr(13))[0]}: {' '.join(body.split())[:90]}")


def _is_whole(data: bytes) -> bool:
    """Tell whether an answer is complete, whatever its framing."""
    head, end, body = data.partition(b"\r\n\r\n")
    at = head.lower().find(b"\r\ncontent-length:")
    if at < 0:
        return bool(end) and body.endswith(b"0\r\n\r\n")
    return len(body) >= int(head[at + 17 :].partition(b"\r\n")[0])


class Stream(Call):
    """The same for a streamed answer.

    :ivar events: so many came, ``[DONE]`` not counted, of all requests.
    :ivar first: nanoseconds from asking to the first event of the last answer.
    :ivar late: of each event so far, the nanoseconds from its sending to here, where ``stamped`` is set.
    """

    stamped = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events = 0
        self.first = 0
        self.late: list[int] = []

    def ask(self) -> None:
        self.first = 0
        super().ask()

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        found = data.count(_EVENT)
        if found:
            if not self.first:
                self.first = time.monotonic_ns() - self.began
            self.events += found
            if self.stamped:
                now = time.monotonic_ns()
                self.late += [now - int(piece[:19]) for piece in data.split(_STAMP)[1:] if len(piece) >= 19]
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self._failed(_bad(data))
        if data.endswith(b"\n0\r\n\r\n"):
            self._rest = b""
            self.events -= 1
            self.finished(self)
        else:
            self._rest = data[-5:]  # shorter than what is looked for


class Transfer(asyncio.Protocol):
    """A connection for large bodies: :meth:`ask` gives a future of the moment at which the whole answer was here."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._whole.done():
            self._whole.set_exception(BadAnswer(f"the connection was closed ({exc})"))

    def ask(self, request: bytes) -> asyncio.Future[None]:
        """Send a request of any size."""
        self._whole = asyncio.get_running_loop().create_future()
        self._head = self._tail = b""
        self._left: int | None = None
        self._transport.write(request)
        return self._whole

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head += data
            head, end, body = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._whole.set_exception(_bad(self._head))
                self._transport.abort()
                return
            at = head.lower().find(b"\r\ncontent-length:")
            self._chunked = at < 0
            self._left = sys.maxsize if self._chunked else int(head[at + 17 :].partition(b"\r\n")[0])
            data = body
        self._left -= len(data)
        self._tail = (self._tail + data)[-7:] if len(data) < 7 else data[-7:]
        if self._left <= 0 or (self._chunked and self._tail == b"\r\n0\r\n\r\n"):
            self._whole.set_result(None)


@frozen
class Outcome:
    """What a load gave: how many answers or events, what was used meanwhile, and the nanoseconds each answer took."""

    count: int
    used: Used
    nanoseconds: list[int]

    def quantile(self, share: float) -> float:
        """Return what ``share`` of the answers did not take longer than, in microseconds."""
        ordered = sorted(self.nanoseconds)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000


class Crowd:
    """Connections to one port that share their end: the first that fails fails it all."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        """End it."""
        if not self._over.done():
            self._over.set_exception(error)

    def finish(self) -> None:
        """All that there was to do is done."""
        if not self._over.done():
            self._over.set_result(None)

    async def connect(self, make: Callable[[int], asyncio.Protocol], port: int, count: int) -> None:
        """Open so many connections more, some at a time."""
        loop = asyncio.get_running_loop()
        while count:
            some = min(count, 200)
            first = len(self.calls)
            made = [loop.create_connection(lambda n=n: make(n), HOST, port) for n in range(first, first + some)]
            self.calls += [protocol for _, protocol in await asyncio.gather(*made)]
            count -= some

    async def wait(self, seconds: float) -> bool:
        """Wait that long, or until the end, and tell whether it is over. Raises :class:`BadAnswer`."""
        done, _ = await asyncio.wait([self._over], timeout=seconds)
        if done:
            self._over.result()
        return bool(done)

    def leave(self) -> None:
        """Close everything."""
        self.finish()
        for call in self.calls:
            call.transport.abort()


async def closed_loop(port: int, requests: list[bytes], connections: int, seconds: float, meter: Meter) -> Outcome:
    """Ask on each connection as soon as the answer before is here, and measure for ``seconds`` after a while.

    :param requests: asked in turn.
    """
    took: list[int] = []
    turn = random.randrange(len(requests))  # or each round would ask the same ones of many

    def again(call: Call) -> None:
        nonlocal turn
        took.append(time.monotonic_ns() - call.began)
        if many:
            turn += 1
            call.request = requests[turn % len(requests)]
        call.ask()

    many = len(requests) > 1
    crowd = Crowd()
    try:
        await crowd.connect(lambda n: Call(requests[(turn - n) % len(requests)], again, crowd.fail), port, connections)
        for call in crowd.calls:
            call.ask()
        return await _measured(crowd, took, seconds, meter)
    finally:
        crowd.leave()


async def _measured(crowd: Crowd, took: list[int], seconds: float, meter: Meter) -> Outcome:
    """Let it warm up, and return what is asked from then on."""
    await crowd.wait(_WARM)
    meter.begin()
    took.clear()
    await crowd.wait(seconds)
    used = meter.end()
    if not took:
        raise BadAnswer("nothing was answered while it was measured")
    return Outcome(len(took), used, took[:])


async def open_loop(
    port: int, requests: list[bytes], *, rate: float, connections: int, seconds: float, meter: Meter
) -> Outcome:
    """Ask ``rate`` times a second whatever became of what was asked before; what finds no connection free waits.

    :param requests: asked in turn on each connection.
    """
    took: list[int] = []
    turn = 0
    waiting: deque[int] = deque()

    def free(call: Call) -> None:
        nonlocal turn
        took.append(time.monotonic_ns() - call.began)
        turn += 1
        call.request = requests[turn % len(requests)]
        if waiting:
            call.ask()
            call.began = waiting.popleft()
        else:
            idle.append(call)

    def due(at: int) -> None:
        if idle:
            call = idle.pop()
            call.ask()
            call.began = at
        else:
            waiting.append(at)

    crowd = Crowd()
    idle: list[Call] = crowd.calls
    ticker = None
    try:
        await crowd.connect(lambda n: Call(requests[n % len(requests)], free, crowd.fail), port, connections)
        idle = list(crowd.calls)
        ticker = Ticker(rate, due)
        return await _measured(crowd, took, seconds, meter)
    finally:
        if ticker:
            ticker.stop()
        crowd.leave()


class Ticker:
    """Calls ``due`` with the time that it is due at (``time.monotonic_ns``), ``rate`` times a second, by a timer of the
    kernel (timerfd(2)).

    The loop's own timers count milliseconds.
    """

    def __init__(self, rate: float, due: Callable[[int], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._every = every = int(1e9 / rate)
        times = (ctypes.c_long * 4)(every // 1_000_000_000, every % 1_000_000_000, 0, every)
        self._next = time.monotonic_ns() + every
        if self._descriptor < 0 or libc.timerfd_settime(self._descriptor, 0, times, None):
            raise OSError(ctypes.get_errno(), "timerfd")
        self._due = due
        asyncio.get_running_loop().add_reader(self._descriptor, self._tick)

    def _tick(self) -> None:
        for _ in range(int.from_bytes(os.read(self._descriptor, 8), "little")):
            self._due(self._next)
            self._next += self._every

    def stop(self) -> None:
        """Call no more."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
