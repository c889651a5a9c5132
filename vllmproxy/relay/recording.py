"""The record of an exchange: begun with its request, filled in at its end."""

from vllmproxy.http1.stream import Stream
from vllmproxy.observers.record import Ended, RequestRecord
from vllmproxy.relay.headers import Client
from vllmproxy.relay.passing import Passing
from vllmproxy.relay.ways import Way


def begin_record(
    stream: Stream, client: Client, id: bytes, *, time: float, way: Way, end_user: str | None
) -> RequestRecord:
    """Return what is known when the head is here."""
    return RequestRecord(
        time=time,
        request_id=id.decode("ascii"),
        method=stream.head.method.decode("ascii"),
        route=way.text,
        client=client.address,
        end_user=end_user,
    )


def end_record(
    record: RequestRecord, stream: Stream, why: Ended, error: str | None, *, seconds: float, passing: Passing | None
) -> None:
    """Add what is known when it is over.

    :param seconds: how long it took.
    :param passing: the answer's body, if there was one.
    """
    record.ended = why
    record.error = error
    record.status = stream.status
    record.bytes_in = stream.bytes_in
    record.bytes_out = stream.bytes_out
    record.duration = seconds
    if passing is not None:
        record.model = passing.model
        record.tell(passing.usage)
