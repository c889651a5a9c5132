"""What of a request goes to vLLM: its header lines, and its body as it comes or as it was held."""

from vllmproxy.http1.answer import OutgoingHeaders
from vllmproxy.http1.bodies import StreamedBody, WholeBody
from vllmproxy.http1.stream import Stream
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.headers import request_lines


def headers_of(stream: Stream, admission: Admission, id: bytes) -> OutgoingHeaders:
    """Return the request's header lines for the server that it goes to."""
    length = None if admission.body is None else sum(map(len, admission.body))
    return OutgoingHeaders(
        request_lines(stream.head, admission.facts.around, id, length), upgrade=stream.head.websocket
    )


def body_of(stream: Stream, admission: Admission) -> StreamedBody | WholeBody | None:
    """Return the request's body, which is the connection's from here on; ``None`` where the request has none."""
    pieces, admission.body = admission.body, None
    if not stream.head.has_body:
        return None
    if pieces is None:
        whole = stream.take_body()
        if whole is None:
            return StreamedBody(stream)
        pieces = [whole]
    return WholeBody(pieces, chunked=stream.head.chunked)
