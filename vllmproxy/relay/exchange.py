"""One request on its way to vLLM and back, as a state machine with its table at the end."""

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import ApiError, BadRequest, Internal, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from vllmproxy.http1.agent import NO_COOKIES, ConnectFailed, RawURL
from vllmproxy.http1.answer import Answer, OutgoingHeaders
from vllmproxy.http1.bodies import StreamedBody
from vllmproxy.http1.client import AnswerLost, UpstreamStalled
from vllmproxy.http1.message import BadAnswer, ResponseHead, WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.keys.credentials import read_credential
from vllmproxy.keys.gate import Caller
from vllmproxy.keys.routes import Group, group_for, is_anthropic
from vllmproxy.observers.record import Ended, RequestRecord
from vllmproxy.relay.headers import answer_lines, request_id, request_lines
from vllmproxy.relay.quotas import Reservation
from vllmproxy.relay.refuse import refuse, refuse_body
from vllmproxy.relay.targets import is_unsafe, split_target, upstream_path
from vllmproxy.relay.tunnel import Tunnel
from vllmproxy.usage.reader import UsageReader, reader_for

if TYPE_CHECKING:
    from vllmproxy.relay.relay import Relay

_log = Logger()

_UNSAFE_PATH = (
    "The path has dot segments, //, ;, a backslash, %2f, %5c or %00, which could be read as another path. "
    "Write it plainly."
)
#: The end user of a request, in LiteLLM's names and order.
_END_USER_HEADERS = (b"x-litellm-customer-id", b"x-litellm-end-user-id")
_LONGEST_END_USER = 256


class State(Enum):
    """Where an exchange is."""

    ADMITTING = "the key is being looked up"
    WAITING = "vLLM has the request, or is getting it"
    ANSWERING = "the answer passes"
    TUNNELLING = "bytes pass both ways"
    OVER = "settled"


class Event(Enum):
    """What can happen to an exchange from outside."""

    ADMITTED = "the caller is known"
    RESERVED = "the key's limits have room for this"
    REFUSED = "the proxy answers itself"
    ANSWERED = "the head of vLLM's answer is here"
    NO_ANSWER = "there will be none"
    BODY_ENDED = "the answer is whole"
    BODY_FAILED = "the answer broke off"
    UPLOAD_FAILED = "the request's body broke its framing, or stopped coming"
    CLIENT_GONE = "the client left"
    LATE = "vLLM did not begin to answer in time"


class Exchange:
    """Relays one request. It is the stream's receiver, the answer's receiver and the answer's producer."""

    def __init__(self, relay: "Relay", stream: Stream) -> None:
        self._relay = relay
        self._stream = stream
        self._state = State.ADMITTING
        self._began = relay.clock.seconds()
        self._target = stream.head.target
        self._path = b""
        self._reservation: Reservation | None = None
        self._forwarded = False
        self._body: StreamedBody | None = None
        self._sending: Deferred[Any] | None = None
        self._answer: Answer | None = None
        self._reader: UsageReader | None = None
        self._client = relay.client_of(stream)
        self._id = request_id(stream.head)
        self._record = RequestRecord(
            time=self._began,
            request_id=self._id.decode("ascii"),
            method=stream.head.method.decode("ascii"),
            route="",
            client=self._client.address,
            end_user=_end_user(stream.head.fields),
        )

    # admission

    def begin(self) -> None:
        """Decide on the head alone whether this request goes on."""
        stream, record = self._stream, self._record
        stream.receiver = self
        upstream = self._relay.server.upstream
        path, query = split_target(stream.head.target)
        forwarded = upstream_path(path, upstream.base_path)
        record.route = forwarded.decode("ascii")
        try:
            if is_unsafe(path):
                raise BadRequest(_UNSAFE_PATH)
            self._path, self._target = forwarded, forwarded + query
            group = group_for(forwarded, upstream.base_path)
            if _is_preflight(stream, group):
                self._send()
                return
            caller = self._relay.gate.identify(read_credential(stream.head.fields))
        except ApiError as error:
            self._feed(Event.REFUSED, error)
            return
        if isinstance(caller, Deferred):
            caller.addCallbacks(self._identified, self._not_admitted, callbackArgs=(group,))
            caller.addErrback(_unexpected)
        else:
            self._feed(Event.ADMITTED, caller, group)

    def _identified(self, caller: Caller, group: Group) -> None:
        self._feed(Event.ADMITTED, caller, group)

    def _not_admitted(self, reason: Failure) -> None:
        error = reason.value
        if not isinstance(error, ApiError):
            _log.failure("Admitting a request failed", reason)
            error = Internal("The proxy failed to look up the key or its limits. Its log says why.")
        self._feed(Event.REFUSED, error)

    def _admitted(self, caller: Caller, group: Group) -> None:
        self._record.key_id = caller.key_id
        self._record.key_alias = caller.key_alias
        relay = self._relay
        try:
            relay.gate.check_route(caller, group, self._path, relay.server.upstream.base_path)
            reserved = None if caller.key is None else relay.quotas.reserve(caller.key)
        except ApiError as error:
            self._refused(error)
            return
        if isinstance(reserved, Deferred):
            reserved.addCallbacks(self._got_reservation, self._not_admitted)
            reserved.addErrback(_unexpected)
        else:
            self._reserved(reserved)

    def _got_reservation(self, reservation: Reservation) -> None:
        if self._state is State.ADMITTING:
            self._feed(Event.RESERVED, reservation)
        else:  # the client left meanwhile
            self._relay.quotas.settle(reservation, forwarded=False)

    def _reserved(self, reservation: Reservation | None) -> None:
        self._reservation = reservation
        self._send()

    def _refused(self, error: ApiError) -> None:
        self._explain(error, "refused")

    def _explain(self, error: ApiError, why: Ended) -> None:
        """Answer with ``error``, and settle."""
        self._state = State.OVER
        self._release()
        refuse(self._stream, error, self._id, anthropic=self._is_anthropic())
        self._settle(why, error.type)

    # sending

    def _is_anthropic(self) -> bool:
        """Whether the caller's SDK is Anthropic's, as far as the route tells."""
        path, _ = split_target(self._stream.head.target)
        return is_anthropic(upstream_path(path, b""))

    def _send(self) -> None:
        self._state = State.WAITING
        self._forwarded = True
        stream, server = self._stream, self._relay.server
        head = stream.head
        lines = request_lines(
            head,
            self._client,
            stream.is_secure,
            self._id,
            host=server.upstream.authority,
            authorization=server.authorization,
        )
        headers = OutgoingHeaders(lines, upgrade=head.websocket, inform=self._inform)
        if head.has_body:
            self._body = StreamedBody(stream)
        else:
            self._relay.first_byte_deadlines.set(self)
        sending = server.client.request(
            head.method.decode("ascii"),
            RawURL(server.origin + self._target.decode("ascii")),
            headers=headers,
            data=self._body,
            unbuffered=True,
            allow_redirects=False,
            cookies=NO_COOKIES,
            reactor=self._relay.clock,  # type: ignore[arg-type]  # only for timeout=, which is not given
        )
        self._sending = sending
        sending.addCallbacks(self._got_answer, self._got_none)
        sending.addErrback(_unexpected)

    def _got_answer(self, response: Any) -> None:
        self._feed(Event.ANSWERED, response.original)

    def _got_none(self, reason: Failure) -> None:
        self._feed(Event.NO_ANSWER, reason)

    def _inform(self, head: ResponseHead) -> None:
        if self._state is State.WAITING:
            lines = answer_lines(head, self._id, self._relay.server.upstream)
            self._stream.inform(head.status, head.reason, lines)

    def _no_answer(self, reason: Failure) -> None:
        if reason.check(ConnectFailed):
            self._forwarded = False  # nothing was sent: it costs nothing
        self._explain(_error_of(reason), "upstream_failed")

    def late(self) -> None:
        """The time for vLLM to begin its answer is over."""
        self._feed(Event.LATE)

    def _late(self) -> None:
        self._cancel()
        self._explain(UpstreamTimeout("vLLM did not begin to answer in time."), "upstream_failed")

    def _cancel(self) -> None:
        """Take the request back; the result, a cancellation, meets a state that ignores it."""
        self._state = State.OVER
        if self._sending is not None:
            self._sending.cancel()

    # the answer

    def _answered(self, answer: Answer) -> None:
        relay, stream, head = self._relay, self._stream, answer.head
        relay.first_byte_deadlines.clear(self)
        self._answer = answer
        if self._body is not None:
            self._body.forget()
        lines = answer_lines(head, self._id, relay.server.upstream)
        if self._reservation is not None:
            lines += self._reservation.lines
        if head.status == 101:
            self._state = State.TUNNELLING
            Tunnel(stream, answer, self._settle).begin(answer, head.reason, lines)
            return
        self._state = State.ANSWERING
        content_type = head.get(b"content-type")
        self._record.streamed = content_type is not None and content_type.startswith(b"text/event-stream")
        self._reader = reader_for(head.status, content_type, head.get(b"content-encoding"))
        stream.start_response(head.status, head.reason, lines, length=head.content_length, bodiless=head.bodiless)
        stream.set_producer(self)
        answer.pipe(self)
        stream.flush()

    def answer_received(self, data: bytes, last: bool) -> None:
        """A piece of vLLM's answer (:class:`~vllmproxy.http1.answer.AnswerReceiver`)."""
        if self._record.time_to_first_byte is None:
            self._record.time_to_first_byte = self._relay.clock.seconds() - self._began
        if self._reader is not None:
            self._reader.feed(data)
        if last:
            self._feed(Event.BODY_ENDED, data)
        else:
            self._stream.write(data)

    def answer_finished(self) -> None:
        """vLLM's answer is whole."""
        self._feed(Event.BODY_ENDED)

    def answer_failed(self, reason: Failure) -> None:
        """vLLM's answer broke off."""
        self._feed(Event.BODY_FAILED, reason)

    def _body_ended(self, data: bytes = b"") -> None:
        self._state = State.OVER
        self._release()
        if data:
            self._stream.write(data, last=True)
        else:
            self._stream.finish()
        self._settle("done")

    def _body_failed(self, reason: Failure) -> None:
        self._state = State.OVER
        self._stream.abort()
        self._settle("upstream_failed", "truncated")

    # the client's side (vllmproxy.http1.stream.Receiver)

    def body_received(self, data: bytes) -> None:
        if self._body is not None:
            self._body.body_received(data)

    def body_complete(self) -> None:
        if self._body is not None:
            if self._state is State.WAITING:
                self._relay.first_byte_deadlines.set(self)
            self._body.body_complete()

    def body_failed(self, error: WireError) -> None:
        self._feed(Event.UPLOAD_FAILED, error)

    def client_gone(self, reason: Failure) -> None:
        self._feed(Event.CLIENT_GONE)

    def tunnel_received(self, data: bytes) -> None:
        """Tunnels have a receiver of their own."""

    def tunnel_half_closed(self) -> None:
        """Tunnels have a receiver of their own."""

    def _upload_failed(self, error: WireError) -> None:
        self._cancel()
        self._release()
        refuse_body(self._stream, error, self._id, anthropic=self._is_anthropic())
        self._settle("refused", "malformed_request")

    def _client_gone(self) -> None:
        answer = self._answer
        self._cancel()
        if answer is not None:
            answer.connection.abort()
        self._settle("client_gone")

    def pauseProducing(self) -> None:
        """The client does not read: neither do we."""
        if self._answer is not None:
            self._answer.connection.pause_answer()

    def resumeProducing(self) -> None:
        """The client reads again."""
        if self._answer is not None and self._state is State.ANSWERING:
            self._answer.connection.resume_answer()

    # the end

    def _release(self) -> None:
        """Give back what was reserved and not used. Before the client can know that its request is over: its next one
        may be waiting on the same connection for the place."""
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            self._relay.quotas.settle(reservation, forwarded=self._forwarded)

    def _settle(self, why: Ended, error: str | None = None) -> None:
        """Report, once: every way out ends here, after the stream was told."""
        self._state = State.OVER
        relay, record, stream = self._relay, self._record, self._stream
        relay.first_byte_deadlines.clear(self)
        self._release()
        record.ended = why
        record.error = error
        record.status = stream.status
        record.bytes_in = stream.bytes_in
        record.bytes_out = stream.bytes_out
        record.duration = relay.clock.seconds() - self._began
        if self._reader is not None:
            record.model, usage = self._reader.finish()
            if usage is not None:
                record.prompt_tokens = usage.prompt_tokens
                record.completion_tokens = usage.completion_tokens
                record.total_tokens = usage.total_tokens
                record.tokens_estimated = True if usage.source == "counted" else None
        relay.observer.finished(record)

    def _feed(self, event: Event, *args: Any) -> None:
        """Act on ``event`` as the table says; a pair that is not in it came too late to matter."""
        action = _TABLE.get((self._state, event))
        if action is not None:
            action(self, *args)


def _is_preflight(stream: Stream, group: Group) -> bool:
    """Whether this is a CORS preflight, which vLLM answers without a key (its ``AuthenticationMiddleware``)."""
    return (
        stream.head.method == b"OPTIONS"
        and not stream.head.has_body
        and group in ("inference", "info")
        and not stream.head.websocket
    )


def _end_user(fields: dict[bytes, list[bytes]]) -> str | None:
    for name in _END_USER_HEADERS:
        if name in fields:
            return fields[name][0].decode("utf-8", "replace")[:_LONGEST_END_USER]
    return None


def _error_of(reason: Failure) -> ApiError:
    """Return what the caller is told when vLLM gave no answer: never an address, never a traceback."""
    error = reason.value
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConnectFailed):
        return UpstreamUnreachable("vLLM cannot be reached just now. Nothing was sent; try again.")
    if isinstance(error, BadAnswer):
        _log.warn("vLLM's answer was refused: {error}", error=str(error))
        return UpstreamFailed("vLLM's answer was not valid HTTP.")
    if isinstance(error, UpstreamStalled):
        return UpstreamTimeout("vLLM did not take the request in time.")
    if isinstance(error, AnswerLost):
        return UpstreamFailed("vLLM closed the connection before it answered. It may have done the work.")
    _log.failure("Sending a request failed", reason)
    return Internal("The proxy failed to send the request. Its log says why.")


def _unexpected(reason: Failure) -> None:
    if reason.check(CancelledError) is None:
        _log.failure("An exchange failed", reason)


_TABLE: dict[tuple[State, Event], Callable[..., None]] = {
    (State.ADMITTING, Event.ADMITTED): Exchange._admitted,
    (State.ADMITTING, Event.RESERVED): Exchange._reserved,
    (State.ADMITTING, Event.REFUSED): Exchange._refused,
    (State.ADMITTING, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.ADMITTING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.WAITING, Event.ANSWERED): Exchange._answered,
    (State.WAITING, Event.NO_ANSWER): Exchange._no_answer,
    (State.WAITING, Event.LATE): Exchange._late,
    (State.WAITING, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.WAITING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.ANSWERING, Event.BODY_ENDED): Exchange._body_ended,
    (State.ANSWERING, Event.BODY_FAILED): Exchange._body_failed,
    (State.ANSWERING, Event.CLIENT_GONE): Exchange._client_gone,
}
