"""Bytes both ways after a 101, until either side ends (RFC 6455 §4; RFC 9110 §7.8)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from vllmproxy.http1.answer import Answer
from vllmproxy.http1.message import WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.observers.record import Ended

if TYPE_CHECKING:
    from vllmproxy.http1.client import ClientConnection


class Tunnel:
    """Joins a client's stream and an upstream connection, with backpressure both ways and half-close where the
    sockets have it.

    :param over: called once, with why it ended, and where that is no side's doing, what was wrong.
    """

    def __init__(self, stream: Stream, answer: Answer, over: Callable[[Ended, str | None], None]) -> None:
        self._stream = stream
        self._connection = answer.connection
        self._over: Callable[[Ended, str | None], None] | None = over
        stream.receiver = _FromClient(self, answer.connection)
        stream.set_producer(_Downlink(answer.connection))
        answer.connection.registerProducer(_Uplink(stream), True)

    def begin(self, answer: Answer, reason: bytes, lines: bytes) -> None:
        """Tell the client, then let bytes pass, those that came early first."""
        self._stream.start_tunnel(reason, lines)
        answer.pipe(_FromUpstream(self, self._stream))

    def ended(self, why: Ended, error: str | None = None) -> bool:
        """Report the end once; ``False`` if it had ended already."""
        over, self._over = self._over, None
        if over is None:
            return False
        over(why, error)
        return True

    def client_ended(self, reason: Failure) -> None:
        if self.ended("done" if reason.check(ConnectionDone) else "client_gone"):
            if reason.check(ConnectionDone):
                self._connection.close()
            else:
                self._connection.abort()

    def upstream_ended(self, clean: bool) -> None:
        if self.ended("done" if clean else "upstream_failed"):
            if clean:
                self._stream.close()
            else:
                self._stream.abort()

    def cut(self, why: Ended, error: str) -> None:
        """End it on both sides at once."""
        if self.ended(why, error):
            self._connection.abort()
            self._stream.abort()


class _FromClient:
    """The stream's receiver in a tunnel."""

    def __init__(self, tunnel: Tunnel, connection: "ClientConnection") -> None:
        self._tunnel = tunnel
        self.tunnel_received = connection.write
        self.tunnel_half_closed = connection.half_close

    def body_received(self, data: bytes) -> None:
        """A handshake has no body."""

    def body_complete(self) -> None:
        """The handshake was whole before the tunnel began."""

    def body_failed(self, error: WireError) -> None:
        """A handshake has no body."""

    def client_gone(self, reason: Failure) -> None:
        self._tunnel.client_ended(reason)


class _FromUpstream:
    """The answer's receiver in a tunnel."""

    def __init__(self, tunnel: Tunnel, stream: Stream) -> None:
        self._tunnel = tunnel
        self._stream = stream
        self.tunnel_half_closed = stream.half_close

    def answer_received(self, data: bytes, last: bool) -> None:
        self._stream.write_raw(data)

    def answer_finished(self) -> None:
        self._tunnel.upstream_ended(clean=True)

    def answer_failed(self, reason: Failure) -> None:
        self._tunnel.upstream_ended(clean=False)


class _Uplink:
    """Paused while the upstream does not read."""

    def __init__(self, stream: Stream) -> None:
        self.pauseProducing = stream.pause_body
        self.resumeProducing = stream.resume_body


class _Downlink:
    """Paused while the client does not read."""

    def __init__(self, connection: "ClientConnection") -> None:
        self.pauseProducing = connection.pause_answer
        self.resumeProducing = connection.resume_answer
