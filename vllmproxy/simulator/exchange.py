"""One request and the answer to it, written to the wire piece by piece, well or badly as asked for."""

import gzip
from collections.abc import Callable, Iterable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from vllmproxy.simulator.request import Request
from vllmproxy.simulator.shapes import Job
from vllmproxy.simulator.stats import Stats

Header = tuple[bytes, bytes]


class Tunnel(Protocol):
    """What takes the bytes of a connection that has left HTTP."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes from the client."""


class Channel(Protocol):
    """The connection, as an exchange sees it."""

    clock: IReactorTime
    stats: Stats
    transport: Any

    def send(self, data: bytes) -> None:
        """Write raw bytes."""

    def close(self) -> None:
        """Write what is queued, then FIN."""

    def reset(self, *, at_once: bool) -> None:
        """RST; unless ``at_once``, when the kernel has taken what has just been written."""

    def exchange_done(self) -> None:
        """The answer is complete: the next request may be answered."""

    def tunnel(self, tunnel: Tunnel) -> None:
        """Hand every later byte to the tunnel."""


class Source(Protocol):
    """What feeds an exchange over time, and can be told to stop."""

    def stop(self) -> None:
        """Write nothing more and let go of the transport."""


def reason_of(status: int) -> bytes:
    """Return the standard reason phrase, or none."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


class Exchange:
    """The answer to one request.

    :ivar plan: what to do once the request's body is complete; ``None`` if it has been answered before.
    :ivar done: nothing more will be written for this request.
    :ivar http10: answer as an HTTP/1.0 server does: no framing, the end is the close.
    :ivar gzip: compress an answer that is in one piece.
    """

    def __init__(self, request: Request, channel: Channel) -> None:
        self.request = request
        self.channel = channel
        self.clock = channel.clock
        self.stats = channel.stats
        self.plan: Callable[[], None] | None = None
        self.begun = False
        self.done = False
        self.http10 = False
        self.gzip = False
        self.keep_alive = request.keep_alive and request.version == "1.1"
        self._making = False
        self._chunked = False
        self._silent = False
        self._dead = False
        self._sent = 0
        self._cut: tuple[int, Callable[[], None]] | None = None
        self._job: Job | None = None
        self._source: Source | None = None
        self._calls: list[IDelayedCall] = []

    @property
    def has_body(self) -> bool:
        """Whether what is written is sent: not for HEAD, nor for a status that has no body."""
        return not self._silent

    @property
    def stopped(self) -> bool:
        """Whether nothing more is sent: it is over, or was cut."""
        return self._dead

    def run(self, plan: Callable[[], None]) -> None:
        """Begin to make an answer; from now on a client that leaves is an abort."""
        self._making = True
        plan()

    # -- the answer ------------------------------------------------------------------------------------

    def informational(self, status: int, headers: Iterable[Header] = ()) -> None:
        """Send an interim answer (1xx)."""
        self.channel.send(_head(b"1.1", status, reason_of(status), headers))

    def begin(
        self,
        status: int,
        headers: Sequence[Header] = (),
        *,
        length: int | None = None,
        reason: bytes | None = None,
        close: bool = False,
    ) -> None:
        """Send the head of the answer.

        :param length: the body's length; ``None`` for a chunked body.
        :param close: end the body by closing instead.
        """
        empty = status < 200 or status in (204, 304)
        self._silent = empty or self.request.method == "HEAD"
        close = close or self.http10
        self._chunked = length is None and not close and not empty
        self.keep_alive = self.keep_alive and not close
        lines = [(b"date", formatdate(self.clock.seconds(), usegmt=True).encode()), (b"server", b"uvicorn")]
        if length is not None and not close and not empty:
            lines.append((b"content-length", b"%d" % length))
        lines += headers
        if not self.keep_alive:
            lines.append((b"connection", b"close"))
        if self._chunked:
            lines.append((b"transfer-encoding", b"chunked"))
        version = b"1.0" if self.http10 else b"1.1"
        self.channel.send(_head(version, status, reason_of(status) if reason is None else reason, lines))
        if self._cut is not None and self._cut[0] == 0:
            self._die(self._cut[1])

    def write(self, data: bytes) -> None:
        """Send a piece of the body, up to the point where a directive cuts the answer."""
        if self._dead or self._silent or not data:
            return
        then = None
        if self._cut is not None and self._sent + len(data) >= self._cut[0]:
            data, then = data[: self._cut[0] - self._sent], self._cut[1]
        self._sent += len(data)
        self.channel.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if then is not None:
            self._die(then)

    def finish(self) -> None:
        """The body is complete."""
        if self._dead:
            return
        if self._chunked and not self._silent:
            self.channel.send(b"0\r\n\r\n")
        if self._job is not None:
            self.stats.generation_tokens += self._job.completion_tokens
            self._end_job(self._job.finish)
        self._retire()
        self.channel.exchange_done()

    def whole(self, status: int, body: bytes, headers: Sequence[Header] = (), *, reason: bytes | None = None) -> None:
        """Send an answer in one piece."""
        if self.gzip:
            body = gzip.compress(body, mtime=0)
            headers = [*headers, (b"content-encoding", b"gzip")]
        self.begin(status, headers, length=len(body), reason=reason)
        self.write(body)
        self.finish()

    # -- over time -------------------------------------------------------------------------------------

    def start_job(self, job: Job) -> None:
        """Count a generation as running until this exchange ends."""
        self._job = job
        self.stats.running += 1
        self.stats.prompt_tokens += job.prompt_tokens

    def feed_from(self, source: Source) -> None:
        """Have the source stopped when the exchange ends."""
        self._source = source

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Call after ``delay`` seconds, or at once for none, unless the exchange ends before."""
        if delay > 0:
            self._calls.append(self.clock.callLater(delay, call))
        else:
            call()

    # -- other ends ------------------------------------------------------------------------------------

    def cut_after(self, count: int, then: Callable[[], None]) -> None:
        """Stop for good after ``count`` bytes of the body, and do ``then``."""
        self._cut = (count, then)

    def raw(self, data: bytes) -> None:
        """Write bytes that need not be HTTP."""
        self.channel.send(data)

    def close(self) -> None:
        """End the connection with a FIN after what was written."""
        self._fail()
        self.channel.close()

    def reset(self, *, at_once: bool = False) -> None:
        """End the connection with an RST; unless ``at_once``, after what has just been written."""
        self._fail()
        self.channel.reset(at_once=at_once)

    def upgrade(self, head: bytes, tunnel: Tunnel) -> None:
        """Leave HTTP: send the head of the 101 and hand the connection over."""
        self.channel.send(head)
        self._retire()
        self.channel.tunnel(tunnel)

    def client_left(self) -> None:
        """The client closed, wholly or by half, or reset: stop making the answer."""
        if self._making and not self.done:
            self.stats.aborts += 1
            self._end_job("abort")
        self._retire()

    def _fail(self) -> None:
        self._end_job("error")
        self._retire()

    def _die(self, then: Callable[[], None]) -> None:
        self._stop()
        then()

    def _end_job(self, reason: str) -> None:
        if self._job is not None:
            self._job = None
            self.stats.running -= 1
            self.stats.finished[reason] += 1

    def _stop(self) -> None:
        self._dead = True
        if self._source is not None:
            self._source.stop()
            self._source = None
        for call in self._calls:
            if call.active():
                call.cancel()
        self._calls.clear()

    def _retire(self) -> None:
        self._stop()
        self.done = True


def _head(version: bytes, status: int, reason: bytes, headers: Iterable[Header]) -> bytes:
    lines = [b"HTTP/%b %d %b" % (version, status, reason), *(b"%b: %b" % pair for pair in headers)]
    return b"\r\n".join([*lines, b"", b""])
