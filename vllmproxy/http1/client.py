"""A connection to an upstream: one request at a time, its answer streamed with backpressure."""

from collections.abc import Callable, Sequence
from socket import socket
from time import monotonic
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, IProtocol, IPushProducer
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import alsoProvides, classImplements

from vllmproxy.http1.answer import (
    Answer,
    AnswerLost,
    AnswerReceiver,
    HandshakeFailed,
    Request,
    UpstreamStalled,
)
from vllmproxy.http1.fate import Verdict
from vllmproxy.http1.message import BadAnswer, Limits
from vllmproxy.http1.responses import ResponseReader
from vllmproxy.http1.sockets import (
    delivery,
    is_closing,
    listen_to,
    queued_bytes,
    raw_socket,
    remains,
    reset_now,
)
from vllmproxy.http1.upload import Upload, in_one_chunk
from vllmproxy.plain import is_plain
from vllmproxy.turn import turn

if TYPE_CHECKING:
    from vllmproxy.http1.agent import ConnectionDeadlines


class ClientConnection:
    """Sends a request, parses its answer with the same suspicion as a request, and says when it is free again.

    :param released: called with the connection when it can take another request.
    :param gone: called with the connection as soon as it cannot be used again, and again when it is closed.
    :param not_executed: called with a request instead of failing it, where a reused connection turned out closed and
        vLLM cannot have seen a byte of it.
    """

    __provides__: Any  # where zope.interface keeps what one instance provides

    def __init__(
        self,
        released: Callable[["ClientConnection"], None],
        gone: Callable[["ClientConnection"], None],
        not_executed: Callable[[Request], None],
        limits: Limits,
        deadlines: "ConnectionDeadlines",
    ) -> None:
        # It has 29 attributes. With 30, CPython 3.11 gives each instance a dictionary of its
        # own names, of 1.6 KiB instead of 0.3.
        self.transport: Any = None
        self._deadlines = deadlines
        self._queued = 0
        self._broken: Failure | None = None
        self._shook = False
        self._shaking: Deferred[ClientConnection] | None = None
        self._released = released
        self._gone = gone
        self._not_executed = not_executed
        self._plain = False
        self._sock: socket | None = None
        self._descriptor = -1
        self._listen: Callable[[int], Sequence[Any]] | None = None
        self._heard = 0
        self._closed = False
        self._secure = False
        self._congested = False
        self._used = False
        #: Bytes that were given to a plain transport.
        self._given = 0
        self._request: Request | None = None
        #: The request, as long as it has no answer.
        self._waiting: Request | None = None
        self._receiver: AnswerReceiver | None = None
        self._producer: Any = None
        self._upload: Upload | None = None
        self._verdict = Verdict(deadlines.clock, lambda: delivery(self._sock))
        self._half_closed = False
        self._shut = False
        self._paused = False
        self._reader = ResponseReader(limits)

    # sending

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connectionMade()

    def connectionMade(self) -> None:
        # Twisted tells nobody who waits for the connection of what is raised here.
        try:
            self._set_up()
        except Exception:  # nothing is awaited here
            self._broken = Failure()

    def _set_up(self) -> None:
        transport = self.transport
        self._plain = is_plain(transport)
        self._secure = isinstance(transport, TLSMemoryBIOProtocol)
        self._sock = raw_socket(transport)
        self._descriptor = -1 if self._sock is None else self._sock.fileno()
        if self._plain:
            transport.protocol = self  # and not the wrapper that Twisted's endpoints put between
        self._verdict.open()
        if self._secure:
            # Not on the class: Twisted's endpoints wrap a plain connection's protocol, and their wrapper provides only
            # the last of the interfaces it looks for, so that half-close would be lost.
            alsoProvides(self, IHandshakeListener)
        if hasattr(transport, "setTcpNoDelay"):
            transport.setTcpNoDelay(True)
            transport.setTcpKeepAlive(True)
        transport.registerProducer(self, True)

    def shaken(self) -> "Deferred[ClientConnection]":
        """Fire with this connection when it can be used: after the TLS handshake where there is one."""
        if self._broken is not None:
            self.abort()
            return fail(self._broken)
        ready: Deferred[ClientConnection] = Deferred(lambda _: self.abort())
        if self._secure and not self._shook:
            self._shaking = ready
            self._deadlines.handshake.set(self)
        else:
            ready.callback(self)
        return ready

    def handshakeCompleted(self) -> None:
        """``IHandshakeListener``: the upstream's certificate is good."""
        self._shook = True
        self._deadlines.handshake.clear(self)
        shaking, self._shaking = self._shaking, None
        if shaking is not None:
            shaking.callback(self)

    def has_ended(self) -> bool:
        """Whether an idle connection's end, or something that nobody asked for, has arrived though the reactor has not
        come to it yet. What the last poll told holds for a moment, but for what is behind something read since."""
        if self._closed or self._descriptor in turn.told:
            return True
        if self._heard != turn.number and monotonic() < turn.holds_until:
            return False
        if self._listen is None:  # most that carry a long stream are never asked
            self._listen = listen_to(self._sock)
        return bool(self._listen(0))

    def send(self, request: Request) -> None:
        """Send ``request``. It fails with :class:`AnswerLost` or :class:`BadAnswer`. Cancelling it resets the
        connection."""
        request.stop = self._cancelled
        self._waiting = self._request = request
        headers = request.headers
        self._reader.begin(request.method, upgrade=headers.upgrade, inform=request.informed)
        self._verdict.begin(reused=self._used, given=self._given if self._plain else None)
        self._used = True
        head = b"%s %s HTTP/1.1\r\n%s\r\n" % (request.method, request.target, headers.lines)
        if request.body is None:
            self.write(head)
        elif request.whole is not None:
            self.write(head + (in_one_chunk(request.whole) if request.chunked else request.whole))
        else:
            self._upload = Upload(self, request)
            self._upload.begin(head)

    def write(self, data: bytes | memoryview) -> None:
        """Send some of a request, or after a 101 of what passes in the tunnel."""
        if self._closed:
            return
        if self._plain:
            self._given += len(data)
            turn.write(self.transport, data)
        else:
            self.transport.write(bytes(data))

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Pause ``producer`` while the upstream does not read."""
        self._producer = producer
        if self._congested:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        self._producer = None

    # the transport's producer: whoever feeds this connection

    def stopProducing(self) -> None:
        """The connection is being lost and its socket is still there: see how far the request came, and read on."""
        self._verdict.pronounce()
        if self._plain and not (self._closed or self._paused):
            for data in remains(self.transport):
                self.dataReceived(data)

    def pauseProducing(self) -> None:
        self._congested = True
        self._queued = queued_bytes(self.transport)
        self._deadlines.write.set(self)
        if self._producer is not None:
            self._producer.pauseProducing()

    def resumeProducing(self) -> None:
        if is_closing(self.transport):
            self._drain(lambda: None)
            return
        self._congested = False
        self._deadlines.write.clear(self)
        if self._producer is not None:
            self._producer.resumeProducing()

    def write_late(self) -> None:
        """The upstream has taken nothing, or only some, of what waits for it: the former ends the connection."""
        queued = queued_bytes(self.transport)
        if queued != self._queued:  # more than before is what was on its way when its producer was paused
            self._queued = queued
            self._deadlines.write.set(self)
        elif queued or not self._shut:
            self.fail(Failure(UpstreamStalled("the upstream does not take the request")))

    # the answer's flow, for whoever receives it

    def pipe(self, receiver: AnswerReceiver) -> None:
        """See :meth:`Answer.pipe`."""
        self._receiver = receiver
        self._deliver(receiver)

    def pause_answer(self) -> None:
        """Read no more of the answer for now."""
        if not self._closed and self._request is not None:
            self._paused = True
            self.transport.pauseProducing()

    def resume_answer(self) -> None:
        """Read the answer again."""
        if not self._closed and self._paused:
            self._paused = False
            self.transport.resumeProducing()

    def half_close(self) -> None:
        """Send no more (a tunnel's end); where TLS forbids that, close."""
        if self._secure or self._half_closed:
            self.close()
        elif not self._closed:
            self._shut = True
            self._drain(self.transport.loseWriteConnection)

    def close(self) -> None:
        """Close when what was written has left, and over TLS the upstream has agreed to it, both in time."""
        if not self._closed:
            self._shut = False
            self._drain(self.transport.loseConnection)

    def _drain(self, end: Callable[[], None]) -> None:
        """Have the transport ``end`` when what is queued has left, and see that it leaves in time."""
        self._deadlines.write.set(self)
        self.transport.unregisterProducer()
        end()
        self._queued = queued_bytes(self.transport)  # only now has TLS written all that it had gathered

    def abort(self) -> None:
        """Reset the connection at once: vLLM stops generating, and nothing more is received."""
        if self._closed:
            return
        self._closed = True
        self._receiver = None
        self._verdict.stop()
        self._gone(self)
        self._stop_upload()
        if self._plain:
            reset_now(self.transport)
        else:
            self.transport.abortConnection()

    def _stop_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            self._producer = None
            upload.stop()

    def _cancelled(self) -> None:
        self._waiting = None
        self.abort()

    # receiving

    def dataReceived(self, data: bytes) -> None:
        if self._closed:
            return
        self._heard = turn.number
        reader = self._reader
        if self._request is None:
            self.abort()  # nobody asked (RFC 9112 §9.2); the next request must not take this for its answer
            return
        try:
            reader.feed(data)
        except BadAnswer as error:
            self.fail(Failure(error))
            return
        if self._waiting is not None and reader.head is not None:
            waiting, self._waiting = self._waiting, None
            waiting.answered(Answer(reader.head, self))
        if self._receiver is not None:
            self._deliver(self._receiver)

    def _deliver(self, receiver: AnswerReceiver) -> None:
        reader = self._reader
        whole = reader.whole
        if reader.pieces:
            data = reader.take()
            if whole:
                self._answered()
            receiver.answer_received(data, whole)
        elif whole:
            self._answered()
            receiver.answer_finished()

    def _answered(self) -> None:
        """The answer is whole: free the connection before its receiver looks for another."""
        self._receiver = None
        if self._upload is not None and not self._upload.is_over:
            self.abort()  # the upstream answered early and does not want the rest
        else:
            self._finished()

    def _finished(self) -> None:
        if self._paused:
            self.resume_answer()  # TLS hands on what it has although it is paused: the end may have come that way
        self._request = self._upload = None
        if self._reader.extra or self._closed or not self._reader.reusable:
            self.abort()
        elif self._secure:
            self._deadlines.clock.callLater(0, self._free)  # TLS may be about to hand on more of what it has read
        else:
            self._released(self)

    def _free(self) -> None:
        if is_closing(self.transport):  # the upstream's close_notify was in it, too
            self.abort()
        elif not self._closed:
            self._released(self)

    def fail(self, reason: Failure) -> None:
        """Give up, and tell whoever waits why."""
        waiting, self._waiting = self._waiting, None
        receiver = self._receiver
        self.abort()
        if waiting is not None:
            waiting.fail(reason)
        elif receiver is not None:
            receiver.answer_failed(reason)

    def readConnectionLost(self) -> None:
        if self._reader.tunnel and self._receiver is not None:
            self._half_closed = True
            self._receiver.tunnel_half_closed()
            return
        self._gone(self)
        self._stop_upload()
        self._verdict.after_fin(self._fin_judged, wanted=self._waiting is not None)

    def _fin_judged(self) -> None:
        self.transport.unregisterProducer()
        self._ended(clean=True)
        self.transport.abortConnection()

    def writeConnectionLost(self) -> None:
        """Our side is shut; nothing to do."""

    def connectionLost(self, reason: Failure) -> None:
        self._deadlines.clear(self)
        shaking, self._shaking = self._shaking, None
        if shaking is not None and not shaking.called:
            shaking.errback(Failure(HandshakeFailed(reason.getErrorMessage())))
        self._ended(clean=reason.check(ConnectionDone) is not None)
        self._gone(self)

    def _ended(self, clean: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._verdict.stop()
        self._stop_upload()
        reader, receiver = self._reader, self._receiver
        waiting, self._waiting = self._waiting, None
        self._receiver = None
        if waiting is not None:
            if self._verdict.unseen and not reader.fed and reader.head is None:
                self._not_executed(waiting)
            else:
                waiting.fail(Failure(AnswerLost("the connection ended before the answer's head")))
        elif receiver is not None:
            if clean and reader.ends_with_connection:
                receiver.answer_finished()
            else:
                receiver.answer_failed(Failure(AnswerLost("the connection ended in the middle of the answer")))


classImplements(ClientConnection, IProtocol, IHalfCloseableProtocol, IPushProducer)
