"""The strict server side of HTTP/1.1: a connection, and its requests one after the other."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IAddress, IDelayedCall, IHalfCloseableProtocol, IProtocol, IPushProducer
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import classImplements

from vllmproxy.deadlines import Deadlines
from vllmproxy.http1.message import RequestHead, WireError
from vllmproxy.http1.pipeline import Pipeline
from vllmproxy.http1.sockets import (
    close_now,
    forget_after,
    hang_up,
    is_closing,
    is_queueing,
    listen_to,
    queued_bytes,
    raw_socket,
    read_long,
    remains,
    reset_now,
)
from vllmproxy.http1.stream import Stream
from vllmproxy.plain import is_plain
from vllmproxy.turn import turn

if TYPE_CHECKING:
    from vllmproxy.http1.factory import ServerFactory

#: Bytes of a body kept while its handler does not want it yet (the key is being looked up, say).
HOLD = 65_536
#: From so many bytes on a body is long: reads are, too.
_LONG = 1 << 20
#: Requests of a connection that are begun in one turn of the reactor: others wait for theirs.
_TURN = 8
#: How much of an unwanted body is read and thrown away so that the answer before it survives (RFC 9112 §9.6).
LINGER_BYTES = 4 * 1024 * 1024


class ServerChannel:
    """A connection from a client: requests one at a time, in order, however they were pipelined."""

    def __init__(self, factory: "ServerFactory", peer: IAddress | None) -> None:
        self.factory = factory
        self.peer = peer
        self.transport: Any = None
        self.congested = False
        self._queued = 0
        self._has_given = False
        self.is_secure = False
        self._plain = False
        self._fd = -1
        self._reading = True
        self._mode = "http"
        self._waiting: Deadlines[ServerChannel] | None = None
        self._active: Stream | None = None
        self._starting = False
        self._resting: IDelayedCall | None = None
        self._times_head = False
        self._times_body = False
        self._lingered = 0
        self._body_before = 0
        self._half_closed = False
        self._shut = False
        self._held_up = False
        self._used = False
        self._requests: Pipeline  # as soon as it is known whence they come

    # the transport's side

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connectionMade()

    def connectionMade(self) -> None:
        transport = self.transport
        self._plain = is_plain(transport)
        self.is_secure = isinstance(transport, TLSMemoryBIOProtocol)
        whence = getattr(self.peer, "host", ""), self.is_secure
        self._requests = Pipeline(self._make, self.factory.limits, self.factory.known, whence)
        sock = raw_socket(transport)
        if sock is not None:
            self._fd = sock.fileno()
        if hasattr(transport, "setTcpNoDelay"):
            transport.setTcpNoDelay(True)
            transport.setTcpKeepAlive(True)
        transport.registerProducer(self, True)
        self.factory.channels.add(self)
        if self.factory.admit(self):
            self._wait_for(self.factory.head_deadlines)
        else:
            self.abort()  # no HTTP was spoken; who sent some already may take it that nothing was done

    def dataReceived(self, data: bytes) -> None:
        if self._mode == "http":
            self._requests.feed(data)
            self._settle()
        elif self._mode == "tunnel":
            self._tunnelled(data)
        elif self._mode == "linger":
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES and not queued_bytes(self.transport):
                self.abort()

    def connectionLost(self, reason: Failure) -> None:
        self._mode = "closed"
        self._unwatch()
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        active, self._active = self._active, None
        self._requests.close()
        if active is not None:
            active.over = True
            if active.receiver is not None:
                active.receiver.client_gone(reason)
        self.factory.forget(self)  # last: whoever waits for the last connection's end wants its request settled

    def readConnectionLost(self) -> None:
        """The client sends no more. As at uvicorn, that is the end, except in a tunnel (RFC 9112 §9.6)."""
        if self._mode == "tunnel" and self._active is not None:
            assert self._active.receiver is not None
            self._half_closed = True
            self._active.receiver.tunnel_half_closed()
        elif self._active is not None:
            self.reset()
        else:
            self.lose()

    def writeConnectionLost(self) -> None:
        """Our side is shut; nothing to do."""

    def pauseProducing(self) -> None:
        self.congested = True
        self._queued = queued_bytes(self.transport)
        self.factory.write_deadlines.set(self)
        if self.is_secure and self._mode not in ("closed", "linger"):
            self._watch()
        if self._active is not None and self._active.producer is not None:
            self._active.producer.pauseProducing()

    def resumeProducing(self) -> None:
        if is_closing(self.transport):
            self._drain(lambda: None)
            return
        self.congested = False
        self.factory.write_deadlines.clear(self)
        if self.is_secure:
            self._watch()
        if self._active is not None:
            if self._active.producer is not None:
                self._active.producer.resumeProducing()
        else:
            self._start_next()

    def stopProducing(self) -> None:
        """The connection is being lost and its socket is still there; ``connectionLost`` follows."""
        if self._mode == "tunnel" and self._plain and self._reading:
            for data in remains(self.transport):
                self._tunnelled(data)

    # one request after the other

    def _make(self, head: RequestHead) -> Stream:
        """A head is complete."""
        if self._waiting is not None:
            self._waiting.clear(self)
            self._waiting = None
        self._times_head = False
        self._used = True
        return Stream(head, self)

    def _settle(self) -> None:
        """Act on what one read brought: hand on bodies, start requests, refuse what broke."""
        if self._requests.in_head and not self._times_head and self._is_unused():
            self._times_head = True
            self._wait_for(self.factory.head_deadlines)
        if self._active is not None:
            if self._requests.error is not None and not self._active.complete:
                self._body_broke(self._active)
                return
            self._active.deliver()
        self._start_next()
        self.update_reading()
        if self.factory.draining:
            self.drain()

    def _start_next(self) -> None:
        if self._starting or self._resting is not None:
            return
        self._starting = True
        begun = 0
        while self._active is None and not self.congested and self._mode == "http":
            stream = self._requests.first()
            error = self._requests.error
            if stream is None or (error is not None and not stream.complete):
                if error is not None:
                    self._answer_broken(error, stream.head if stream else None)
                break
            if begun == _TURN:
                self._resting = self.factory.clock.callLater(0, self._rested)
                break
            begun += 1
            self._active = self._requests.pop()
            self.factory.handle(self._active)
        self._starting = False

    def _rested(self) -> None:
        """Others have had their turn."""
        self._resting = None
        self._start_next()
        self._went_on()

    def finished(self, stream: Stream) -> None:
        """The active answer is written: go on, or close where the connection cannot be used again."""
        if self._active is not stream:
            return
        self._active = None
        self._has_given = stream.status < 400
        if self._times_body:
            self._time_no_body()
        if stream.closes or self._mode == "closed":
            self._close_after(stream.complete)
            return
        if stream.head.websocket:  # the upstream did not switch: what follows is plain HTTP again
            self._requests.resume()
        self._start_next()
        self._went_on()

    def _went_on(self) -> None:
        """One answer is written, and the next one begun if there is a request for it."""
        if self._is_unused():
            self._times_head = self._requests.in_head
            self._wait_for(self.factory.head_deadlines if self._times_head else self.factory.idle_deadlines)
        self.update_reading()
        if self.factory.draining:
            self.drain()

    @property
    def is_last(self) -> bool:
        """Whether the answer that begins now is the last one here, because the server is stopping."""
        return self.factory.draining and self._requests.is_empty and not self._requests.in_head

    def drain(self) -> None:
        """The server is stopping: close if no request is under way, nor on its way as far as can be seen."""
        if not self._is_idle():
            return
        if not self._used:
            self.factory.unused_deadlines.set(self)
        elif not listen_to(raw_socket(self.transport))(0):
            self.lose()

    def unused_late(self) -> None:
        """The server is stopping, and this connection's client has had its time to send a first request."""
        if self._is_idle():
            self.lose()

    def _is_idle(self) -> bool:
        return self._is_unused() and not self._requests.in_head

    def _is_unused(self) -> bool:
        """Whether there is no request here but one whose head is still coming."""
        return self._active is None and self._requests.is_empty and self._mode == "http"

    def _wait_for(self, deadlines: "Deadlines[ServerChannel] | None") -> None:
        """Wait for a head, or idly; ``None``: neither, as a request is here or the end is near."""
        if self._waiting is not None:
            self._waiting.clear(self)
        self._waiting = deadlines
        if deadlines is not None:
            deadlines.set(self)

    def _body_broke(self, stream: Stream) -> None:
        """The active request's body is malformed, or late: the upstream must not take it for a whole one."""
        error, receiver = self._requests.error, stream.receiver
        assert error is not None
        if not stream.status and receiver is not None:
            receiver.body_failed(error)
        else:  # too late to say so
            self.abort()

    def _answer_broken(self, error: WireError, head: RequestHead | None) -> None:
        self.send(self.factory.render(error, head, self.peer))
        self._close_after(False)

    # the socket

    def send(self, data: bytes) -> None:
        """Write to the client, straight to its socket where that is possible."""
        if self._plain:
            if self.transport is not None and self._mode != "closed":
                turn.write(self.transport, data)
        elif self.transport is not None:
            self.transport.write(data)

    def update_reading(self) -> None:
        """Read from the socket exactly while somebody wants what comes."""
        stream = self._active
        if self._mode in ("closed", "linger"):
            return
        if self._requests.has_early:
            wanted = False
        elif stream is None:
            wanted = self._requests.is_empty
        elif stream.complete or self._mode == "tunnel":
            wanted = self._requests.is_empty and not stream.paused
        else:
            wanted = not stream.paused and (stream.flowing or stream.held_bytes < HOLD)
        if wanted != self._reading:
            self._set_reading(wanted)
        if wanted and stream is not None and not stream.complete and not stream.awaits_continue:
            self._times_body = True
            if self._plain:
                read_long(self.transport, stream.flowing and (stream.head.content_length or 0) > _LONG)
            self.factory.body_deadlines.set(self)
            if self.factory.rate_deadlines.begin(self):
                self._body_before = stream.bytes_in + stream.held_bytes
        elif self._times_body:
            self._time_no_body()

    def _time_no_body(self) -> None:
        self._times_body = False
        if self._plain:
            read_long(self.transport, False)
        self.factory.body_deadlines.clear(self)
        self.factory.rate_deadlines.clear(self)

    def _set_reading(self, wanted: bool) -> None:
        self._reading = wanted
        transport: Any = self.transport
        if wanted:
            transport.resumeProducing()
        else:
            transport.pauseProducing()
        self._watch()

    def _watch(self) -> None:
        """Have somebody look out for the client's leaving while the reactor does not: it reads nothing from a paused
        connection, nor from one that TLS closes behind what is queued, which a congested one may be."""
        if self._fd < 0:
            return
        in_tunnel = self._mode == "tunnel"
        if not self._reading or (self.congested and self.is_secure and not in_tunnel):
            self.factory.hangups.watch(self._fd, self.reset, resets_only=in_tunnel)
        else:
            self._unwatch()

    def reset(self) -> None:
        """Reset before anything else happens. The client is gone, maybe behind bytes that nobody reads (in a tunnel a
        close is found behind those), or somebody else needs its place."""
        if self._plain:
            self._unwatch()
            reset_now(self.transport)
        else:
            self.abort()

    def _unwatch(self) -> None:
        if self._fd >= 0:
            self.factory.hangups.forget(self._fd)

    def start_tunnel(self) -> None:
        """Pass raw bytes from here on, the client's early ones first."""
        self._mode = "tunnel"
        early = self._requests.take_early()
        if early:
            self._tunnelled(early)
        self.update_reading()

    def _tunnelled(self, data: bytes) -> None:
        if self._active is not None:
            assert self._active.receiver is not None
            self._active.bytes_in += len(data)
            self._active.receiver.tunnel_received(data)

    def half_close(self) -> None:
        """Shut our sending side, or close where TLS forbids that (FIN without close_notify)."""
        if self.is_secure or self._half_closed:
            self.lose()
        else:
            self._shut = True
            self._drain(self.transport.loseWriteConnection)

    def lose(self) -> None:
        """Close once what is queued has left; how long that may take, its progress decides."""
        self._mode = "closed"
        self._unwatch()
        self._wait_for(None)
        self._drain(self.transport.loseConnection)
        if self.is_secure:  # it is kept until the client says goodbye, too
            self.factory.linger_deadlines.set(self)

    def head_late(self) -> None:
        """The head took too long: say so if any of it has come."""
        if self._requests.in_head and self._mode == "http":
            self._answer_broken(WireError(408, "The request's head did not arrive in time."), None)
        else:
            self.lose()

    def body_late(self) -> None:
        """The client announced a body and stopped sending it. That is no reason to cut an answer which has begun: it
        says that the connection closes after it (RFC 9112 §9.6)."""
        active = self._active
        if active is not None and not active.complete and not active.status:
            self._requests.fail(WireError(408, "The request's body did not arrive in time."))
            self._body_broke(active)

    def body_slow(self) -> None:
        """The client has had its time to send some of a body: end it unless that was enough."""
        active = self._active
        if active is None:
            return
        before, self._body_before = self._body_before, active.bytes_in + active.held_bytes
        if self._body_before - before < self.factory.least_body:
            self.body_late()
        else:
            self.factory.rate_deadlines.set(self)

    def write_late(self) -> None:
        """The client has taken nothing, or only some, of what waits for it: the former ends the connection."""
        queued = queued_bytes(self.transport)
        if queued != self._queued:  # more than before is what was on its way when its producer was paused
            self._queued = queued
            self.factory.write_deadlines.set(self)
        elif queued:
            self.abort()
        elif not (self._shut or self._mode == "linger" or self._is_closing_tls):
            self.abort()  # of the others, the first waits for its client, and the rest has ``linger_late``

    def linger_late(self) -> None:
        """The client has had its time to read what was said and to say goodbye, if all of that has left in time."""
        held_up, self._held_up = self._held_up, bool(queued_bytes(self.transport))
        if self._held_up or (held_up and self._mode == "linger"):
            self.factory.linger_deadlines.set(self)
        elif self._mode == "linger":
            self.abort()
        else:
            hang_up(self.transport)  # no reset: what has left may not have been read yet

    def evict(self) -> None:
        """Make room for another connection, at once. An idle one's last answer may be on its way: it is not to be lost,
        if nothing but the kernel has to send it. (Nobody can tell of TLS, which has buffers of its own.)"""
        if self.has_said_all:
            hang_up(self.transport)
            return
        if self._plain:
            turn.flush(self.transport)
            if self._used and self._active is None and not is_queueing(self.transport):
                self._unwatch()
                forget_after(self.transport, self.factory.write_deadlines.seconds)
                close_now(self.transport)
                return
        self.reset()

    @property
    def has_answered(self) -> bool:
        """Whether no request is under way, though others may have come behind those that were answered."""
        return self._active is None

    @property
    def is_sending(self) -> bool:
        """Whether some of an answer that was no refusal is still to be sent."""
        return self._has_given and (turn.keeps(self.transport) or is_queueing(self.transport))

    @property
    def has_said_all(self) -> bool:
        """Whether this is closing and only the client's close_notify is awaited."""
        return self._is_closing_tls and not queued_bytes(self.transport)

    @property
    def _is_closing_tls(self) -> bool:
        return self.is_secure and self._mode == "closed"

    def abort(self) -> None:
        """Reset."""
        self._unwatch()
        if self.transport is not None:
            self.transport.abortConnection()

    def _drain(self, end: Callable[[], None]) -> None:
        """Have the transport ``end`` when what is queued has left, and see that it leaves in time."""
        self.factory.write_deadlines.set(self)
        forget_after(self.transport, self.factory.write_deadlines.seconds)
        self.transport.unregisterProducer()
        end()
        self._queued = queued_bytes(self.transport)  # only now has TLS written all that it had gathered

    def _close_after(self, request_whole: bool) -> None:
        """Close after the last answer; while the client still sends, read on for a little (RFC 9112 §9.6)."""
        if request_whole and self._reading:
            self.lose()
            return
        self._mode = "linger"
        self._wait_for(None)
        self._unwatch()
        transport: Any = self.transport
        # TLS, having said that it closes, reads on until the peer says so too.
        self._drain(transport.loseConnection if self.is_secure else transport.loseWriteConnection)
        self.factory.linger_deadlines.set(self)
        if not self._reading:
            self._reading = True
            transport.resumeProducing()


classImplements(ServerChannel, IProtocol, IHalfCloseableProtocol, IPushProducer)
