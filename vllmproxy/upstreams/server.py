"""One vLLM server that can be asked: its agent, and what every request to it carries."""

from typing import Any

from attrs import define, field, frozen
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP6ClientEndpoint,
    UNIXClientEndpoint,
    wrapClientTLS,
)
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger

from vllmproxy.authorities import Authorities
from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.streaming import StreamingClient
from vllmproxy.upstreams.upstream import Upstream

_log = Logger(namespace=__name__)


@define(eq=False)
class Told:
    """What the server has told of itself.

    :ivar fingerprint: see :class:`~vllmproxy.usage.withhold.Withholder`.
    :ivar refuses: that it does not accept the proxy's key.
    """

    fingerprint: bytes | None = None
    refuses: bool = False


@frozen(eq=False)
class Server:
    """A vLLM server and the way to it.

    :ivar client: treq over this server's own agent.
    :ivar authorization: the server's own key as a header line, or empty.
    """

    upstream: Upstream
    agent: UpstreamAgent
    client: StreamingClient
    authorization: bytes = b""
    told: Told = field(factory=Told)

    def refused(self) -> None:
        """Say once in the log that the server does not accept the proxy's key: its 401 goes to a client whose own key
        is good, who cannot know."""
        if not self.told.refuses:
            self.told.refuses = True
            why = "it does not accept the key that the proxy has for it" if self.authorization else "it wants a key"
            message = "{name} answers 401: {why} (--upstream-key-file, VLLM_API_KEY)"
            _log.error(message, name=self.upstream.name, why=why)


def make_server(
    reactor: Any,
    upstream: Upstream,
    *,
    key: str | None,
    authorities: Authorities | None = None,
    connect_timeout: float,
    idle_timeout: float,
    write_timeout: float,
) -> Server:
    """Return the server for ``upstream``; no connection is made yet.

    :param key: the server's own API key.
    :param authorities: who may sign its certificate; ``None``: whom the system trusts.
    :param idle_timeout: seconds that an idle connection is kept for reuse.
    :param connect_timeout: seconds for the name and the connection, and as many again for the TLS handshake.
    :param write_timeout: seconds in which the server takes no byte of what waits for it.
    """
    endpoint = _endpoint(reactor, upstream, authorities, connect_timeout)
    agent = UpstreamAgent(
        reactor,
        endpoint,
        upstream.origin,
        name=upstream.name,
        idle=idle_timeout,
        connect_timeout=connect_timeout,
        handshake_timeout=connect_timeout,
        write_timeout=write_timeout,
    )
    authorization = b"authorization: Bearer %s\r\n" % key.encode() if key else b""
    return Server(upstream, agent, StreamingClient(agent), authorization)


def _endpoint(
    reactor: Any, upstream: Upstream, authorities: Authorities | None, timeout: float
) -> IStreamClientEndpoint:
    if upstream.socket_path is not None:
        return UNIXClientEndpoint(reactor, upstream.socket_path, timeout=timeout)
    host, port = upstream.host, upstream.port
    endpoint: IStreamClientEndpoint
    if isIPAddress(host):
        endpoint = TCP4ClientEndpoint(reactor, host, port, timeout=timeout)
    elif isIPv6Address(host):
        endpoint = TCP6ClientEndpoint(reactor, host, port, timeout=timeout)
    else:
        endpoint = HostnameEndpoint(reactor, host, port, timeout=timeout)
    if upstream.scheme == "https":
        trust_root = None if authorities is None else authorities.trust_root()
        return wrapClientTLS(optionsForClientTLS(host, trustRoot=trust_root), endpoint)
    return endpoint
