"""The record of an exchange: begun with its request, filled in at its end."""

from vllmproxy.http1.stream import Stream
from vllmproxy.observers.record import Ended, RequestRecord
from vllmproxy.relay.facts import Facts
from vllmproxy.relay.passing import Passing


def begin_record(facts: Facts, id: bytes, *, time: float) -> RequestRecord:
    """Return what is known when the head is here."""
    return RequestRecord(
        time=time,
        request_id=id.decode("ascii"),
        method=facts.method,
        route=facts.way.text,
        client=facts.client.address,
        end_user=facts.end_user,
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
