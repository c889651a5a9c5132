"""The branch of the resource tree beside ``/vllm``: buffered ``twisted.web`` requests, for Klein."""

from attrs import define
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Site

from vllmproxy.http1.message import WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.web import WebExchange
from vllmproxy.observers.record import Observer, RequestRecord
from vllmproxy.relay.headers import TrustedProxies, request_id
from vllmproxy.relay.refuse import reason_of, refusal_lines, request_id_line, wire_body


@define(eq=False)
class ApiBranch:
    """Hands requests to the API's site and reports them.

    :ivar max_body: bytes of a request's body.
    """

    clock: IReactorTime
    site: Site
    observer: Observer
    trusted: TrustedProxies
    max_body: int

    def handle(self, stream: Stream) -> None:
        """Take a request whose head is complete."""
        began = self.clock.seconds()
        id = request_id(stream.head)
        self.observer.started()

        def refuse(stream: Stream, error: WireError) -> None:
            stream.respond(error.status, reason_of(error.status), refusal_lines(id), wire_body(error))
            done(stream, True)

        def done(stream: Stream, answered: bool) -> None:
            self.observer.finished(
                RequestRecord(
                    time=began,
                    request_id=id.decode("ascii"),
                    method=stream.head.method.decode("ascii"),
                    route=_route(stream.head.target),
                    client=self.trusted.client(getattr(stream.peer, "host", ""), stream.head).address,
                    status=stream.status,
                    bytes_in=stream.bytes_in,
                    bytes_out=stream.bytes_out,
                    duration=self.clock.seconds() - began,
                    ended="done" if answered else "client_gone",
                )
            )

        exchange = WebExchange(
            stream, self.site, limit=self.max_body, refuse=refuse, extra_lines=request_id_line(id), done=done
        )
        exchange.begin()


def _route(target: bytes) -> str:
    """Return the first two segments of the path: the API's names. What follows, and the query, may hold a key."""
    path = target.partition(b"?")[0].decode("ascii")
    return "/".join(path.split("/")[:3])
