"""The branch of the resource tree under ``/vllm``: makes an exchange of each request."""

from attrs import define, field
from twisted.internet.interfaces import IReactorTime

from vllmproxy.http1.deadlines import Deadlines
from vllmproxy.http1.stream import Stream
from vllmproxy.keys.gate import Gate
from vllmproxy.observers.record import Observer
from vllmproxy.relay.exchange import Exchange
from vllmproxy.relay.headers import Client, TrustedProxies
from vllmproxy.relay.quotas import Quotas
from vllmproxy.upstreams.server import Server


@define(eq=False)
class Relay:
    """What all exchanges share.

    :ivar first_byte_timeout: seconds from the end of the request to the head of its answer; prefill is slow.
    """

    clock: IReactorTime
    gate: Gate
    server: Server
    observer: Observer
    trusted: TrustedProxies
    quotas: Quotas
    first_byte_timeout: float = 600.0
    first_byte_deadlines: Deadlines[Exchange] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.first_byte_deadlines = Deadlines(self.clock, self.first_byte_timeout, Exchange.late)

    def handle(self, stream: Stream) -> None:
        """Take a request whose head is complete."""
        self.observer.started()
        Exchange(self, stream).begin()

    def client_of(self, stream: Stream) -> Client:
        """Return who is at the other end of ``stream``."""
        return self.trusted.client(getattr(stream.peer, "host", ""), stream.head)

    async def close(self) -> None:
        """End the waits and the connections to vLLM, and settle what is left."""
        self.first_byte_deadlines.close()
        self.server.agent.close()
        await self.quotas.close()
