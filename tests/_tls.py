"""One end of a TLS connection that closes as the test says: with a close_notify, a FIN or a reset, or any of them."""

import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import trustme
from _reactor import reactor
from attrs import frozen
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import Certificate, PrivateCertificate, optionsForClientTLS, trustRootFromCertificates
from twisted.internet.task import deferLater

T = TypeVar("T")
NAME = "tls.test"
#: What :meth:`TLSPeer.end` knows.
ENDS = ["close_notify", "close_notify fin", "close_notify close", "close_notify rst", "fin", "close", "rst"]


@frozen
class Authority:
    """A certificate for :data:`NAME`, for Twisted and for ``ssl``, and what trusts it."""

    certificate: Any
    server: ssl.SSLContext
    client: ssl.SSLContext
    _trust: Any

    @classmethod
    def make(cls) -> "Authority":
        authority = trustme.CA()
        issued = authority.issue_cert(NAME)
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        issued.configure_cert(server)
        authority.configure_trust(client)
        pem = issued.private_key_and_cert_chain_pem.bytes()
        trust = trustRootFromCertificates([Certificate.loadPEM(authority.cert_pem.bytes())])
        return cls(PrivateCertificate.loadPEM(pem).options(), server, client, trust)

    def endpoint(self, port: int) -> IStreamClientEndpoint:
        """To a TLS listener on loopback."""
        options = optionsForClientTLS(NAME, trustRoot=self._trust)
        endpoint: IStreamClientEndpoint = wrapClientTLS(options, TCP4ClientEndpoint(reactor, "127.0.0.1", port))
        return endpoint


class TLSPeer:
    """Reads only when told to.

    :param sock: connected, or connecting, and not blocking.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        self.sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else NAME
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=name)

    async def handshake(self) -> None:
        await self._run(self._tls.do_handshake)

    async def send(self, *records: bytes) -> None:
        """Send them in one go."""
        for data in records:
            self._tls.write(data)
        await self._flush()

    async def receive(self) -> bytes:
        """Return the next bytes; ``b""`` after a close_notify.

        :raises ssl.SSLEOFError: at an end without one.
        """
        return await self._run(lambda: self._tls.read(65_536))

    async def close_notify(self) -> None:
        """Say that no more comes, and leave TCP as it is."""
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        await self._flush()

    def half_close(self) -> None:
        """Send FIN."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """FIN, or RST where the kernel has bytes that were not read."""
        self.sock.close()

    def reset(self) -> None:
        """Send RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def raw(self, limit: int = 65_536) -> bytes:
        """Return the next bytes as they come off the wire, ``b""`` at their end.

        :raises ConnectionResetError: at a reset.
        """
        end = time.monotonic() + 20
        while True:
            with suppress(BlockingIOError):
                return self.sock.recv(limit)
            assert time.monotonic() < end
            await deferLater(reactor, 0.002, lambda: None)

    async def drain(self) -> str:
        """Read, and decrypt nothing, up to the end of the connection; return how it ended: ``fin`` or ``reset``."""
        try:
            while await self.raw():
                pass
        except ConnectionResetError:
            return "reset"
        return "fin"

    async def end(self, how: str) -> None:
        """End it in one of :data:`ENDS`, and read on where that is still possible."""
        words = how.split()
        if "close_notify" in words:
            await self.close_notify()
            await deferLater(reactor, 0.02, lambda: None)  # it is read before the queue has left
        if "fin" in words:
            self.half_close()
        if "close" in words:
            self.close()
        elif "rst" in words:
            self.reset()
        else:
            await self.drain()

    async def _run(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.raw()
                self._in.write(data) if data else self._in.write_eof()
            except ssl.SSLZeroReturnError:
                return b""  # type: ignore[return-value]
            finally:
                await self._flush()

    async def _flush(self) -> None:
        data = self._out.read()
        while data:
            with suppress(BlockingIOError):
                data = data[self.sock.send(data) :]
                continue
            await deferLater(reactor, 0.002, lambda: None)
