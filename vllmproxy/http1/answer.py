"""A request as it goes to an upstream and the answer that comes back, in the dress that treq needs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from attrs import define
from twisted.internet.interfaces import IProtocol
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer, IResponse
from zope.interface import classImplements

from vllmproxy.http1.message import ResponseHead

if TYPE_CHECKING:
    from vllmproxy.http1.client import ClientConnection


class AnswerLost(Exception):
    """The connection ended before the answer was whole: vLLM may or may not have done the work."""


class HandshakeFailed(Exception):
    """No TLS session with the upstream: its certificate was refused, or it does not speak TLS, or not in time."""


class UpstreamStalled(AnswerLost):
    """The upstream took no byte of the request for a long time."""


class NotExecuted(AnswerLost):
    """A reused connection turned out closed, and vLLM cannot have seen a byte of this request: it may be sent again
    on another connection.

    How that is known says :mod:`vllmproxy.http1.fate`.
    """


class Asker(Protocol):
    """Waits for an answer. It raises nothing."""

    def informed(self, head: ResponseHead) -> None:
        """The head of an informational answer."""

    def answered(self, answer: "Answer") -> None:
        """The answer's head is complete."""

    def not_answered(self, reason: Failure) -> None:
        """There will be none; perhaps before the call that asked for it has returned."""


class AnswerReceiver(Protocol):
    """Takes an answer's body."""

    def answer_received(self, data: bytes, last: bool) -> None:
        """A piece of the body, chunked coding removed; with ``last`` the answer is whole."""

    def answer_finished(self) -> None:
        """The answer is whole; nothing came with its end."""

    def answer_failed(self, reason: Failure) -> None:
        """The answer broke off: what was received must not be taken for a whole one."""

    def tunnel_half_closed(self) -> None:
        """After a 101: the upstream will send no more."""


@define(slots=True, eq=False)
class OutgoingHeaders:
    """A request's header lines as they go on the wire, in place of Twisted's ``Headers``.

    :ivar lines: header lines with their CRLF, Host and framing included.
    :ivar upgrade: the request asks for a tunnel, so that a 101 is allowed.
    :ivar sent: the request was given to a connection, so that the upstream may have seen some of it.
    """

    lines: bytes
    upgrade: bool = False
    sent: bool = False


class Request:
    """A request on its way.

    :ivar target: origin-form.
    :ivar whole: all of the body, where it is at hand.
    :ivar chunked: frame the body's pieces as chunks.
    :param asker: is told what becomes of it, as long as that is not known.
    :ivar stop: what cancelling it does now.
    """

    __slots__ = ("_asker", "body", "chunked", "headers", "method", "stop", "target", "whole")

    def __init__(
        self,
        method: bytes,
        target: bytes,
        headers: OutgoingHeaders,
        body: IBodyProducer | None,
        asker: "Asker",
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.whole: bytes | None = getattr(body, "whole", None)
        self.chunked = body is not None and body.length is UNKNOWN_LENGTH
        self.stop: Callable[[], None] | None = None
        self._asker: Asker | None = asker

    def cancel(self) -> None:
        """Take it back, whatever has become of it; nobody is told of anything any more."""
        self._asker = None
        stop, self.stop = self.stop, None
        if stop is not None:
            stop()

    def informed(self, head: ResponseHead) -> None:
        """An informational answer has come."""
        if self._asker is not None:
            self._asker.informed(head)

    def answered(self, answer: "Answer") -> None:
        """The answer's head is complete."""
        asker, self._asker, self.stop = self._asker, None, None
        if asker is not None:
            asker.answered(answer)

    def fail(self, reason: Failure) -> None:
        """There will be no answer."""
        asker, self._asker, self.stop = self._asker, None, None
        if asker is not None:
            asker.not_answered(reason)


class Answer:
    """An answer whose head is complete: ``IResponse`` for Twisted and treq, and :meth:`pipe` for who streams it."""

    request = None
    version = (b"HTTP", 1, 1)

    def __init__(self, head: ResponseHead, connection: "ClientConnection") -> None:
        self.head = head
        self.connection = connection
        self.previousResponse: IResponse | None = None

    @property
    def code(self) -> int:
        return self.head.status

    @property
    def phrase(self) -> bytes:
        return self.head.reason

    @property
    def headers(self) -> Headers:
        headers = Headers()
        for name, value in self.head.headers:
            headers.addRawHeader(name, value)
        return headers

    @property
    def length(self) -> Any:
        return UNKNOWN_LENGTH if self.head.content_length is None else self.head.content_length

    def pipe(self, receiver: AnswerReceiver) -> None:
        """Deliver the body, what has come already first. To be called as soon as the answer is there."""
        self.connection.pipe(receiver)

    def deliverBody(self, protocol: IProtocol) -> None:
        self.connection.pipe(_ProtocolReceiver(protocol))

    def setPreviousResponse(self, response: IResponse) -> None:
        self.previousResponse = response


classImplements(Answer, IResponse)


class _ProtocolReceiver:
    """The ``deliverBody`` contract on top of :class:`AnswerReceiver`."""

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def answer_received(self, data: bytes, last: bool) -> None:
        self._protocol.dataReceived(data)
        if last:
            self.answer_finished()

    def answer_finished(self) -> None:
        self._protocol.connectionLost(Failure(ResponseDone()))

    def answer_failed(self, reason: Failure) -> None:
        self._protocol.connectionLost(reason)

    def tunnel_half_closed(self) -> None:
        """Nobody tunnels through ``deliverBody``."""
