"""The server channel behind TLS on real sockets: a client's end in each of its forms, and our own."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from _reactor import reactor, until
from _site import Filler, Site, site
from _tls import ENDS, Authority, TLSPeer
from twisted.internet.error import ConnectionDone
from twisted.internet.task import deferLater

from vllmproxy.http1.sockets import is_closing
from vllmproxy.http1.stream import Stream

Lingering = Callable[..., AbstractAsyncContextManager[Site]]

LAST = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
WEBSOCKET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make()


@asynccontextmanager
async def client_of(server: Site, authority: Authority) -> AsyncIterator[TLSPeer]:
    """A client with a small receive buffer, its handshake done."""
    client = TLSPeer(server.connect(receive_buffer=16_384), authority.client)
    await until(lambda: client.sock.connect_ex(("127.0.0.1", server.port.getHost().port)) in (0, 106))
    await client.handshake()
    yield client
    client.sock.close()


@pytest.fixture
def lingering(authority: Authority) -> Lingering:
    """Make a site that waits so many seconds for a close_notify, and for everything else for ever."""

    def make(linger: float, **more: Any) -> AbstractAsyncContextManager[Site]:
        return site(authority.certificate, linger_timeout=linger, write_timeout=3600, **more)

    return make


async def ask(server: Site, client: TLSPeer, data: bytes) -> Stream:
    count = len(server.streams)
    await client.send(data)
    await until(lambda: len(server.streams) > count)
    return server.streams[-1]


@pytest.mark.parametrize("how", ENDS)
@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_a_paused_answer(how: str, authority: Authority) -> None:
    """Twisted resumes the producer of a connection that TLS is closing, and waits for it to end."""
    async with site(authority.certificate) as server, client_of(server, authority) as client:
        stream = await ask(server, client, GET)
        Filler(stream, 50_000_000)
        await until(lambda: stream.channel.congested)
        await client.end(how)
        await until(lambda: stream.over)
        assert stream.bytes_out < 50_000_000
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]
        await until(lambda: not server.factory.channels)


@pytest.mark.parametrize("words", ["fin", "close_notify fin"])
@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_and_takes_nothing_more(words: str, authority: Authority) -> None:
    """It does not read what is queued for it: its FIN is heard all the same, long before a deadline."""
    async with site(authority.certificate, write_timeout=3600) as server, client_of(server, authority) as client:
        stream = await ask(server, client, GET)
        stream.start_response(200, b"OK", b"", length=50_000_000)
        stream.write(b"x" * 20_000_000)  # more than the kernel's queues hold, so that it stays so
        await until(lambda: stream.channel.congested)
        if "close_notify" in words:
            await client.close_notify()
            await until(lambda: is_closing(stream.channel.transport))
        client.half_close()
        await until(lambda: stream.over)
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]
        await until(lambda: not server.factory.channels)


@pytest_twisted.ensureDeferred
async def test_a_client_that_says_goodbye_and_reads_no_more(authority: Authority) -> None:
    async with site(authority.certificate, write_timeout=0.3) as server, client_of(server, authority) as client:
        stream = await ask(server, client, GET)
        Filler(stream, 50_000_000)
        await until(lambda: stream.channel.congested)
        await client.close_notify()
        await until(lambda: stream.over)
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_a_paused_tunnel(authority: Authority) -> None:
    async with site(authority.certificate) as server, client_of(server, authority) as client:
        stream = await ask(server, client, WEBSOCKET)
        stream.start_tunnel(b"S", b"")
        while not stream.channel.congested:
            stream.write_raw(b"x" * 5_000_000)
            await deferLater(reactor, 0.05, lambda: None)
        await client.end("close_notify")
        await until(lambda: not server.factory.channels)
        receiver: Any = stream.receiver
        assert receiver.events[-1] == "client_gone"
        assert receiver.reasons[0].check(ConnectionDone)


@pytest_twisted.ensureDeferred
async def test_a_client_that_never_says_goodbye(authority: Authority, lingering: Lingering) -> None:
    """Its answer has left: it may still be reading it, so the end is no reset. Nor is it that of a slow client."""
    async with lingering(0.2) as server, client_of(server, authority) as client:
        stream = await ask(server, client, LAST)
        stream.respond(200, b"OK", b"", b"ok")
        assert (await client.receive()).endswith(b"\r\n\r\nok")
        assert await client.receive() == b""
        assert await client.drain() == "fin"


@pytest_twisted.ensureDeferred
async def test_a_slow_client_has_its_answer_before_that(authority: Authority, lingering: Lingering) -> None:
    async with lingering(0.05) as server, client_of(server, authority) as client:
        stream = await ask(server, client, LAST)
        stream.respond(200, b"OK", b"", b"x" * 10_000_000)
        await deferLater(reactor, 0.3, lambda: None)
        received = len(await client.receive())
        assert server.factory.channels
        while data := await client.receive():
            received += len(data)
        assert received > 10_000_000
        assert await client.drain() == "fin"


@pytest.mark.parametrize("end", ["idle", "drain"])
@pytest_twisted.ensureDeferred
async def test_an_idle_connection_that_is_closed_waits_no_longer_either(
    end: str, authority: Authority, lingering: Lingering
) -> None:
    """Nor does a server that stops."""
    idle = 0.2 if end == "idle" else 3600
    async with lingering(0.2, idle_timeout=idle) as server, client_of(server, authority) as client:
        stream = await ask(server, client, GET)
        stream.respond(200, b"OK", b"", b"ok")
        if end == "drain":
            drained: list[None] = []
            server.factory.drain().addCallback(drained.append)
            await until(lambda: bool(drained))
        await until(lambda: not server.factory.channels)
        assert await client.drain() == "fin"


@pytest_twisted.ensureDeferred
async def test_a_connection_that_closes_makes_room_for_a_new_one(authority: Authority, lingering: Lingering) -> None:
    """Before one that is idle does, unless it has something to say still."""
    async with (
        lingering(3600, max_connections=3) as server,
        client_of(server, authority) as closing,
        client_of(server, authority) as slow,
        client_of(server, authority) as idle,
    ):
        for client, request, size in ((slow, LAST, 10_000_000), (closing, LAST, 2), (idle, GET, 2)):
            stream = await ask(server, client, request)
            stream.respond(200, b"OK", b"", b"x" * size)
        await until(lambda: server.streams[1].channel.has_said_all)
        async with client_of(server, authority):
            assert server.factory.evicted == 1
            assert await closing.drain() == "fin"
            assert not _is_over(idle)
            async with client_of(server, authority):
                assert server.factory.evicted == 2
                await until(lambda: _is_over(idle))
        received = 0
        while data := await slow.receive():
            received += len(data)
        assert received > 10_000_000


@pytest_twisted.ensureDeferred
async def test_an_answer_to_an_unfinished_upload_ends_with_a_close_notify(authority: Authority) -> None:
    """Its length is not told, so its end has to be (RFC 9112 §9.8)."""
    async with site(authority.certificate, linger_timeout=0.2) as server, client_of(server, authority) as client:
        stream = await ask(server, client, b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\n")
        stream.start_response(200, b"OK", b"", length=None)
        stream.write(b"ok", last=True)
        assert (await client.receive()).endswith(b"\r\n\r\nok")
        assert await client.receive() == b""
        await client.send(b"x" * 50)
        await client.drain()


@pytest_twisted.ensureDeferred
async def test_a_silent_client_makes_room_for_a_new_one(authority: Authority) -> None:
    async with (
        site(authority.certificate, max_connections=1) as server,
        client_of(server, authority) as silent,
        client_of(server, authority) as client,
    ):
        stream = await ask(server, client, GET)
        stream.respond(200, b"OK", b"", b"ok")
        assert server.factory.evicted == 1
        await until(lambda: _is_over(silent))


@pytest_twisted.ensureDeferred
async def test_one_connection_too_many(authority: Authority) -> None:
    """It is reset in the middle of its handshake, and leaves nothing behind."""
    async with (
        site(authority.certificate, per_client=1, client_of=lambda _: "one") as server,
        client_of(server, authority),
    ):
        other = TLSPeer(server.connect(), authority.client)
        await until(lambda: _is_over(other))
        assert server.factory.refused == {"client_full": 1}
        assert len(server.factory.channels) == 1
        other.sock.close()


def _is_over(client: TLSPeer) -> bool:
    try:
        return not client.sock.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
