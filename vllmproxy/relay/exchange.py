"""One request on its way to vLLM and back, as a state machine with its table at the end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import ApiError, AuthError, BadRequest, Internal, UpstreamTimeout
from vllmproxy.http1.answer import Answer, OutgoingHeaders, Request
from vllmproxy.http1.bodies import StreamedBody, WholeBody
from vllmproxy.http1.message import REQUEST_ID, ResponseHead, WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.ids import fresh_id
from vllmproxy.keys.gate import Caller
from vllmproxy.keys.routes import is_anthropic
from vllmproxy.observers.record import Ended
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.bill import Bill, Outcome
from vllmproxy.relay.facts import facts_of
from vllmproxy.relay.failures import error_of
from vllmproxy.relay.headers import answer_lines, request_id_in
from vllmproxy.relay.passing import Passing
from vllmproxy.relay.quotas import Reservation
from vllmproxy.relay.recording import begin_record, end_record
from vllmproxy.relay.refuse import refuse, refuse_body
from vllmproxy.relay.sending import body_of, headers_of
from vllmproxy.relay.states import Event, State
from vllmproxy.relay.targets import split_target, upstream_path
from vllmproxy.relay.tunnel import Tunnel
from vllmproxy.relay.waits import Patience

if TYPE_CHECKING:
    from vllmproxy.relay.relay import Relay

_log = Logger(namespace=__name__)

_UNSAFE_PATH = (
    "The path has dot segments, //, ;, a backslash, %2f, %5c or %00, which could be read as another path. "
    "Write it plainly."
)
_TOO_LONG = "The request took longer in all than this proxy allows (--total-timeout)."
_REVOKED = "Authentication Error, Key is blocked, or deleted, since this request began."


class Exchange:
    """Relays one request. It is the stream's receiver, the answer's receiver and the answer's producer."""

    def __init__(self, relay: "Relay", stream: Stream) -> None:
        self._relay = relay
        self._stream = stream
        self._state = State.ADMITTING
        self._began = relay.clock.seconds()
        self._facts = facts = facts_of(stream, relay.server, relay.trusted)
        self._bill: Bill | None = None
        self._headers: OutgoingHeaders | None = None
        self._released = self._settled = False
        self._body: StreamedBody | WholeBody | None = None
        self._sending: Request | None = None
        self._answer: Answer | None = None
        self._passing: Passing | None = None
        self._tunnel: Tunnel | None = None
        self._patience = Patience(self, relay.waits)
        self._admission = Admission(relay, stream, facts)
        fields = stream.head.fields
        self._id = (REQUEST_ID in fields and request_id_in(fields)) or fresh_id()
        self._record = begin_record(facts, self._id, time=self._began)

    # admission

    def begin(self) -> None:
        """Decide on the head alone whether this request goes on."""
        stream = self._stream
        stream.receiver = self
        try:
            if self._facts.way.is_unsafe:
                stream.head.keep_alive = False  # whoever writes such a path is given no second try on this connection
                raise BadRequest(_UNSAFE_PATH)
            if self._facts.is_preflight:
                self._queue()
                return
            caller = self._relay.gate.identify(self._facts.credential)
            if isinstance(caller, Caller):
                self._admitted(caller)
            else:
                caller.addCallbacks(self._identified, self._not_admitted)
        except ApiError as error:
            self._refused(error)
        except Exception:  # nothing is awaited here, and whoever begins it may be in the middle of another request
            self._broke(Failure())

    def _identified(self, caller: Caller) -> None:
        self.feed(Event.ADMITTED, caller)

    def _not_admitted(self, reason: Failure) -> None:
        error = reason.value
        if not isinstance(error, ApiError):
            _log.failure("Admitting a request failed", reason)
            error = Internal("The proxy failed to look up the key or its limits. Its log says why.")
        self.feed(Event.REFUSED, error)

    def _admitted(self, caller: Caller) -> None:
        self._record.key_id = caller.key_id
        self._record.key_alias = caller.key_alias
        holds = self._admission.check(caller)
        self._relay.began(self, caller.key_id)
        if not holds:
            self._queue()
        elif not self._stream.head.has_body:
            self._held()
        elif (whole := self._stream.take_body()) is not None:
            self._admission.hold(whole)
            self._held()
        else:
            self._admission.expect()
            self._state = State.HOLDING
            self._stream.read_body()

    def _hold(self, data: bytes) -> None:
        self._admission.hold(data)

    def _held(self) -> None:
        self._state = State.ADMITTING
        self._admission.judge()
        self._record.end_user = self._admission.end_user
        self._queue()

    def _queue(self) -> None:
        if self._relay.line.enter(self, self._facts.client):
            self._go_on()
        else:
            self._state = State.QUEUED
            self._patience.for_place()

    def _placed(self) -> None:
        self._patience.for_nothing()
        self._go_on()

    def _go_on(self) -> None:
        self._state = State.ADMITTING
        if self._facts.is_preflight:
            self._send()
        else:
            self._reserve()

    def _not_placed(self) -> None:
        self._explain(self._relay.line.late(), "refused")

    def _reserve(self) -> None:
        key = self._admission.caller.key
        reserved = None if key is None else self._relay.quotas.reserve(key, self._admission.demand)
        if reserved is None or isinstance(reserved, Reservation):
            self._reserved(reserved)
        else:
            reserved.addCallbacks(self._got_reservation, self._not_admitted)
            reserved.addErrback(self._broke)

    def _got_reservation(self, reservation: Reservation) -> None:
        if self._state is State.ADMITTING:
            self.feed(Event.RESERVED, reservation)
        else:  # the client left meanwhile
            self._relay.cancel(reservation)

    def _reserved(self, reservation: Reservation | None) -> None:
        self._bill = self._relay.open_bill(self._admission, reservation, self._record.time)
        self._send()

    def _refused(self, error: ApiError) -> None:
        self._explain(error, "refused")

    def _explain(self, error: ApiError, why: Ended) -> None:
        """Answer with ``error``, and settle."""
        self._state = State.OVER
        self._release(why)
        refuse(self._stream, error, self._id, anthropic=self._is_anthropic())
        self._settle(why, error.type)

    # sending

    def _is_anthropic(self) -> bool:
        """Whether the caller's SDK is Anthropic's, as far as the route tells."""
        path, _ = split_target(self._stream.head.target)
        return is_anthropic(upstream_path(path, b""))

    def _send(self) -> None:
        self._state = State.WAITING
        stream, facts = self._stream, self._facts
        self._headers = headers = headers_of(stream, self._admission, self._id)
        self._body = body_of(stream, self._admission)
        if not isinstance(self._body, StreamedBody):
            self._patience.for_answer(facts.way.route)
        self._sending = facts.server.client.ask(stream.head.method, facts.url, headers, self._body, self)

    # what becomes of it (vllmproxy.http1.answer.Asker)

    def answered(self, answer: Answer) -> None:
        self.feed(Event.ANSWERED, answer)

    def not_answered(self, reason: Failure) -> None:
        self.feed(Event.NO_ANSWER, reason)

    def informed(self, head: ResponseHead) -> None:
        if self._state is State.WAITING:
            lines = answer_lines(head, self._id, self._facts.server.upstream)
            self._stream.inform(head.status, head.reason, lines)

    def _no_answer(self, reason: Failure) -> None:
        self._explain(error_of(reason), "upstream_failed")

    def _late(self) -> None:
        self._cancel()
        self._explain(UpstreamTimeout("vLLM did not begin to answer in time."), "upstream_failed")

    def _cancel(self) -> None:
        """Take the request back."""
        self._state = State.OVER
        if self._sending is not None:
            self._sending.cancel()

    # the answer

    def _answered(self, answer: Answer) -> None:
        stream, head = self._stream, answer.head
        self._answer = answer
        if self._body is not None:
            self._body.forget()
        self._admission.release()
        if head.status == 401:
            self._facts.server.refused()
        lines = answer_lines(head, self._id, self._facts.server.upstream)
        if self._bill is not None:
            lines += self._bill.lines
        if head.status == 101:
            self._state = State.TUNNELLING
            self._patience.for_tunnel()
            self._tunnel = Tunnel(stream, answer, self._tunnel_over)
            self._tunnel.begin(answer, head.reason, lines)
            return
        self._state = State.ANSWERING
        self._passing = Passing(head, self._facts.server.told, withholds=self._admission.withholds)
        self._record.streamed = self._passing.streamed
        length = None if self._passing.shortens else head.content_length
        stream.start_response(head.status, head.reason, lines, length=length, bodiless=head.bodiless)
        stream.set_producer(self)
        answer.pipe(self)
        if self._state is not State.ANSWERING:  # all of it was here
            return
        stream.flush()
        if self._record.time_to_first_byte is None:
            self._patience.for_answer(self._facts.way.route)  # it may be a stream whose prompt is yet to be read

    def answer_received(self, data: bytes, last: bool) -> None:
        """A piece of vLLM's answer (:class:`~vllmproxy.http1.answer.AnswerReceiver`)."""
        if self._record.time_to_first_byte is None:
            self._record.time_to_first_byte = self._relay.clock.seconds() - self._began
            if not last:
                self._patience.for_more()
        assert self._passing is not None
        data = self._passing.feed(data)
        if last:
            self.feed(Event.BODY_ENDED, data)
        else:
            self._stream.write(data)

    def answer_finished(self) -> None:
        """vLLM's answer is whole."""
        self.feed(Event.BODY_ENDED)

    def answer_failed(self, reason: Failure) -> None:
        """vLLM's answer broke off."""
        self.feed(Event.BODY_FAILED, reason)

    def _body_ended(self, data: bytes = b"") -> None:
        self._state = State.OVER
        assert self._passing is not None
        data += self._passing.finish()
        self._release("done")
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
        if isinstance(self._body, StreamedBody):
            self._body.body_received(data)
        else:
            self.feed(Event.PIECE, data)

    def body_complete(self) -> None:
        self.feed(Event.HELD)
        if isinstance(self._body, StreamedBody):
            if self._state is State.WAITING:
                self._patience.for_answer(self._facts.way.route)
            self._body.body_complete()

    def body_failed(self, error: WireError) -> None:
        self.feed(Event.UPLOAD_FAILED, error)

    def client_gone(self, reason: Failure) -> None:
        self.feed(Event.CLIENT_GONE)

    def tunnel_received(self, data: bytes) -> None:
        """Tunnels have a receiver of their own."""

    def tunnel_half_closed(self) -> None:
        """Tunnels have a receiver of their own."""

    def _upload_failed(self, error: WireError) -> None:
        self._cancel()
        self._release("refused")
        refuse_body(self._stream, error, self._id, anthropic=self._is_anthropic())
        self._settle("refused", error.kind)

    def _client_gone(self) -> None:
        answer = self._answer
        self._cancel()
        if answer is None:
            self._left()
        else:
            answer.connection.abort()
            self._relay.next_turn(self._left)

    def _left(self) -> None:
        if self._relay.is_ending:
            self._settle("refused", "stopping")
        else:
            self._settle("client_gone")

    def _tunnel_over(self, why: Ended, error: str | None) -> None:
        if why == "client_gone":
            self._left()
        else:
            self._settle(why, error)

    def pauseProducing(self) -> None:
        """The client does not read: neither do we."""
        if self._answer is not None:
            self._answer.connection.pause_answer()

    def resumeProducing(self) -> None:
        """The client reads again."""
        if self._answer is not None and self._state is State.ANSWERING:
            self._answer.connection.resume_answer()

    # the end

    @property
    def has_place(self) -> bool:
        """Whether it may have a place already, which is the next one's when it ends."""
        return self._state not in (State.HOLDING, State.QUEUED)

    @property
    def is_forwarded(self) -> bool:
        """Whether vLLM has the request, or is getting it."""
        return self._state not in (State.ADMITTING, State.HOLDING, State.QUEUED)

    def _revoked(self) -> None:
        self._cancel()
        self._explain(AuthError(_REVOKED), "refused")

    def _expired(self) -> None:
        self._cancel()
        self._explain(UpstreamTimeout(_TOO_LONG), "refused")

    def _cut(self, why: Ended, error: str) -> None:
        """What passes breaks off on both sides."""
        if self._tunnel is not None:
            self._tunnel.cut(why, error)
            return
        assert self._answer is not None
        self._state = State.OVER
        self._answer.connection.abort()
        self._stream.abort()
        self._settle(why, error)

    def _broke(self, reason: Failure) -> None:
        """What must not fail did: say so where that can still be said, and break off where it cannot."""
        if reason.check(CancelledError):
            return
        _log.failure("An exchange failed", reason)
        if self._settled:
            return
        is_answer_over = self._state is State.OVER  # then its connection may be another's by now
        self._cancel()
        if self._answer is not None and not is_answer_over:
            self._answer.connection.abort()
        if self._stream.status:
            self._stream.abort()
            self._settle("upstream_failed", Internal.type)
        else:
            self._explain(Internal("The proxy failed at this request. Its log says why."), "upstream_failed")

    def _cut_revoked(self) -> None:
        self._cut("refused", "revoked")

    def _cut_expired(self) -> None:
        self._cut("refused", "total_timeout")

    def _look(self) -> None:
        """Cut what has been silent for too long. A reset, so that the client can tell that this is not all."""
        stream = self._stream
        passed = stream.bytes_out + (stream.bytes_in if self._tunnel is not None else 0)
        if not self._patience.lasts(passed, held_up=stream.is_congested):
            self._cut("upstream_failed", "stalled")

    def _release(self, why: Ended) -> None:
        """Give back what was reserved and not used, and write down what was. Before the client can know that its
        request is over: its next one may be waiting on the same connection for the place."""
        if self._released:
            return
        self._released = True
        self._admission.release()
        try:
            if self._passing is not None:
                self._passing.read()
            bill, self._bill = self._bill, None
            if bill is not None:
                status = 0 if self._answer is None else self._answer.head.status
                was_sent = self._headers is not None and self._headers.sent  # else it costs nothing
                bill.settle(Outcome(why, was_sent, status, self._passing))
        finally:
            self._relay.line.leave(self)

    def _settle(self, why: Ended, error: str | None = None) -> None:
        """Report, once: every way out ends here, after the stream was told."""
        self._state = State.OVER
        self._settled = True
        relay, record, stream = self._relay, self._record, self._stream
        self._patience.end()
        self._release(why)
        relay.ended(self, record.key_id)
        end_record(record, stream, why, error, seconds=relay.clock.seconds() - self._began, passing=self._passing)
        relay.observer.finished(record)
        if stream.receiver is self:
            stream.receiver = None  # or each would wait for the collector because of the other

    def feed(self, event: Event, *args: Any) -> None:
        """Act on ``event`` as the table says; a pair that is not in it came too late to matter."""
        action = _TABLE.get((self._state, event))
        if action is not None:
            try:
                action(self, *args)
            except ApiError as error:  # only what admits a request raises one: it does not pass
                self._explain(error, "refused")
            except Exception:  # nothing is awaited here
                self._broke(Failure())


_TABLE: Final[dict[tuple[State, Event], Callable[..., None]]] = {
    (State.ADMITTING, Event.ADMITTED): Exchange._admitted,
    (State.ADMITTING, Event.RESERVED): Exchange._reserved,
    (State.ADMITTING, Event.REFUSED): Exchange._refused,
    (State.ADMITTING, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.ADMITTING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.ADMITTING, Event.EXPIRED): Exchange._expired,
    (State.ADMITTING, Event.REVOKED): Exchange._revoked,
    (State.HOLDING, Event.PIECE): Exchange._hold,
    (State.HOLDING, Event.HELD): Exchange._held,
    (State.HOLDING, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.HOLDING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.HOLDING, Event.EXPIRED): Exchange._expired,
    (State.HOLDING, Event.REVOKED): Exchange._revoked,
    (State.QUEUED, Event.PLACED): Exchange._placed,
    (State.QUEUED, Event.LATE): Exchange._not_placed,
    (State.QUEUED, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.QUEUED, Event.CLIENT_GONE): Exchange._client_gone,
    (State.QUEUED, Event.EXPIRED): Exchange._expired,
    (State.QUEUED, Event.REVOKED): Exchange._revoked,
    (State.WAITING, Event.ANSWERED): Exchange._answered,
    (State.WAITING, Event.NO_ANSWER): Exchange._no_answer,
    (State.WAITING, Event.LATE): Exchange._late,
    (State.WAITING, Event.UPLOAD_FAILED): Exchange._upload_failed,
    (State.WAITING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.WAITING, Event.EXPIRED): Exchange._expired,
    (State.WAITING, Event.REVOKED): Exchange._revoked,
    (State.ANSWERING, Event.BODY_ENDED): Exchange._body_ended,
    (State.ANSWERING, Event.BODY_FAILED): Exchange._body_failed,
    (State.ANSWERING, Event.CLIENT_GONE): Exchange._client_gone,
    (State.ANSWERING, Event.LATE): Exchange._look,
    (State.ANSWERING, Event.EXPIRED): Exchange._cut_expired,
    (State.ANSWERING, Event.REVOKED): Exchange._cut_revoked,
    (State.TUNNELLING, Event.LATE): Exchange._look,
    (State.TUNNELLING, Event.REVOKED): Exchange._cut_revoked,
}
