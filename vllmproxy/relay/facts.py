"""What a request's head tells the relay: worked out once for all heads of a connection that are alike."""

from typing import Final

from attrs import define

from vllmproxy.http1.message import RequestHead, once
from vllmproxy.http1.stream import Stream
from vllmproxy.inspection.alike import BodyReader
from vllmproxy.inspection.request import Asked, printable
from vllmproxy.inspection.splice import Edit
from vllmproxy.keys.credentials import Credential, read_credential
from vllmproxy.keys.key import VirtualKey
from vllmproxy.relay.headers import Around, Client, TrustedProxies, around_of
from vllmproxy.relay.targets import split_target
from vllmproxy.relay.ways import Way, way_of
from vllmproxy.upstreams.server import Server
from vllmproxy.usage.reader import UsageMode

#: The end user of a request, in LiteLLM's names and order.
_END_USER_HEADERS: Final = (b"x-litellm-customer-id", b"x-litellm-end-user-id")

#: What a body is read by; of several, vLLM takes the first, and others the last.
_DECIDING: Final = {b"content-type": "Content-Type", b"content-encoding": "Content-Encoding"}
#: What vLLM takes for the model on ``/invocations``, whatever the body says (its SageMaker router).
_OVERRIDES: Final = frozenset({b"x-amzn-sagemaker-adapter-identifier"})


@define(eq=False)  # not frozen, which takes three times as long to make
class Terms:
    """What is to be done with a body, and with all that are alike.

    :ivar asked: what it asks for, ``key``: whose rules it was held against, and ``usage``: how usage was to be known.
    :ivar model: what vLLM calls the model.
    :ivar edits: what is changed of it.
    :ivar withholds: the answer will have one event that the client did not ask for.
    """

    asked: Asked
    key: VirtualKey
    usage: UsageMode
    model: str | None
    edits: list[Edit]
    withholds: bool


@define  # as above
class Facts:
    """What a head tells, whatever the length of its body and the request's id.

    :ivar server: where the request goes, and ``trusted``: whose word counts; the relay's may be exchanged meanwhile.
    :ivar client: who is at the other end.
    :ivar way: where it is going; ``url``: the same with the query, for the client of ``server``.
    :ivar method: as text.
    :ivar credential: what the caller showed; ``bodies``: reads what they send.
    :ivar opened_by: the last key that opened this way.
    :ivar terms: what was to be done with the last of them.
    :ivar end_user: whom it names as its own user, if anybody.
    :ivar is_preflight: this is a CORS preflight, which vLLM answers without a key (its ``AuthenticationMiddleware``).
    :ivar around: the header lines for vLLM around those that differ from request to request.
    """

    server: Server
    trusted: TrustedProxies
    client: Client
    way: Way
    url: bytes
    method: str
    credential: Credential
    end_user: str | None
    bodies: BodyReader
    is_preflight: bool
    around: Around
    opened_by: VirtualKey | None = None
    terms: Terms | None = None


def facts_of(stream: Stream, server: Server, trusted: TrustedProxies) -> Facts:
    """Return what the head of ``stream`` tells of a request to ``server``."""
    head = stream.head
    facts = once(head, _facts_of, stream, server, trusted)
    if facts.server is not server or facts.trusted is not trusted:  # one of them was exchanged since
        facts = _facts_of(head, stream, server, trusted)
        assert head.memo is not None  # or they would have been made for these
        head.memo[_facts_of] = facts
    return facts


def _facts_of(head: RequestHead, stream: Stream, server: Server, trusted: TrustedProxies) -> Facts:
    upstream = server.upstream
    client = trusted.client(getattr(stream.peer, "host", ""), head)
    path, query = split_target(head.target)
    way = way_of(head.method, path, upstream.base_path)
    asks_alone = head.method == b"OPTIONS" and not head.has_body and not head.websocket
    return Facts(
        server=server,
        trusted=trusted,
        client=client,
        way=way,
        url=upstream.origin + way.path + query,
        method=head.method.decode("ascii"),
        credential=read_credential(head.fields),
        end_user=_end_user_in(head.fields),
        bodies=_reader_of(way.route, head.fields),
        is_preflight=asks_alone and way.group in ("inference", "info"),
        around=around_of(head, client, stream.is_secure, server.authorization, host=upstream.authority),
    )


def _end_user_in(fields: dict[bytes, list[bytes]]) -> str | None:
    for name in _END_USER_HEADERS:
        if name in fields and (user := printable(fields[name][0].decode("utf-8", "replace"))):
            return user
    return None


def _reader_of(route: str, fields: dict[bytes, list[bytes]]) -> BodyReader:
    """Return what reads the bodies of such heads."""
    deciding: list[bytes | None] = []
    for name, said in _DECIDING.items():
        values = fields.get(name)
        if values is not None and len(values) > 1:
            return BodyReader(route, None, unclear=f"there are several headers {said}")
        deciding.append(values[0] if values else None)
    unclear = "" if _OVERRIDES.isdisjoint(fields) else "a header names another model"
    return BodyReader(route, deciding[0], deciding[1], unclear)
