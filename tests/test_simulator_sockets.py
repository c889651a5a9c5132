"""The simulated vLLM over real sockets, where FIN, RST and backpressure are the kernel's."""

import hashlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from _reactor import reactor, until
from _simulated import Collector, parse, post, request
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from vllmproxy.simulator.faults import pattern
from vllmproxy.simulator.server import SimulatorConfig, SimulatorFactory

DEADLINE = 20.0


@asynccontextmanager
async def simulated(**config: Any) -> AsyncIterator[tuple[SimulatorFactory, int]]:
    factory = SimulatorFactory(reactor, SimulatorConfig(**config))
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    try:
        yield factory, port.getHost().port
    finally:
        await port.stopListening()
        await until(lambda: not factory.connections)


async def connected(port: int) -> Collector:
    return await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Collector())


async def ended(client: Collector) -> type[BaseException]:
    await client.closed.addTimeout(DEADLINE, reactor)
    assert client.lost is not None
    return client.lost.type


async def ask(client: Collector, data: bytes, count: int = 1) -> Any:
    client.transport.write(data)  # type: ignore[union-attr]
    await until(lambda: sum(answer.complete for answer in parse(client.data)) >= count)
    return parse(client.data)[count - 1]


async def gone(client: Collector) -> None:
    client.transport.abortConnection()  # type: ignore[union-attr]
    await ended(client)


@pytest_twisted.ensureDeferred
async def test_a_stream_and_then_another_request_on_the_same_connection() -> None:
    async with simulated(tpot=0.001) as (factory, port):
        client = await connected(port)
        body = {"prompt": "x", "max_tokens": 50, "stream": True}
        events = (await ask(client, post("/v1/completions", body))).events()
        assert len(events) == 51
        assert (await ask(client, request("GET", "/health"), 2)).status == 200
        assert (factory.stats.connections_total, factory.stats.aborts) == (1, 0)
        await gone(client)


@pytest.mark.parametrize(
    ("directive", "after", "reason"),
    [
        ("die; after=300", 300, ConnectionDone),
        ("reset; after=300", 300, ConnectionLost),
        ("reset", 0, ConnectionLost),
        ("close-before-head", None, ConnectionDone),
        ("reset-before-head", None, ConnectionLost),
    ],
)
@pytest_twisted.ensureDeferred
async def test_how_a_connection_ends(directive: str, after: int | None, reason: type[BaseException]) -> None:
    async with simulated() as (factory, port):
        client = await connected(port)
        warm = await ask(client, request("GET", "/health"))
        assert warm.status == 200
        client.forget()
        client.transport.write(request("GET", "/v1/models", x_vllmsim=directive))  # type: ignore[union-attr]
        assert await ended(client) is reason
        answers = parse(client.data)
        if after is None:
            assert answers == []
        else:
            assert len(answers[0].body) == after
        assert factory.stats.aborts == 0


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
@pytest.mark.parametrize("stream", [True, False])
@pytest_twisted.ensureDeferred
async def test_leaving_is_noticed_before_the_first_token(how: str, stream: bool) -> None:
    async with simulated(ttft=1000.0) as (factory, port):
        client = await connected(port)
        client.transport.write(post("/v1/completions", {"prompt": "x", "stream": stream}))  # type: ignore[union-attr]
        await until(lambda: factory.stats.running == 1)
        transport: Any = client.transport
        {"close": transport.loseConnection, "half-close": transport.loseWriteConnection}.get(
            how, transport.abortConnection
        )()
        await ended(client)
        await until(lambda: factory.stats.aborts == 1)
        assert factory.stats.running == 0


@pytest_twisted.ensureDeferred
async def test_an_idle_connection_is_closed() -> None:
    async with simulated(keep_alive=0.05) as (_, port):
        client = await connected(port)
        await ask(client, request("GET", "/health"))
        assert await ended(client) is ConnectionDone


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest_twisted.ensureDeferred
async def test_a_long_body_is_hashed_and_not_kept() -> None:
    size, piece = 256 * 1024 * 1024, bytes(range(256)) * 4096
    expected = hashlib.sha256()
    peak: list[int] = []

    def upload(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE * 3) as sock:
            head = request("POST", "/v1/chat/completions", x_vllmsim="echo", content_length=str(size))
            sock.sendall(head)
            for _ in range(size // len(piece)):
                sock.sendall(piece)
                expected.update(piece)
                peak.append(resident())
            answer = b""
            while not (parse(answer) and parse(answer)[-1].complete):
                answer += sock.recv(65536)
            return answer

    async with simulated() as (_, port):
        before = resident()
        (answer,) = parse(await deferToThread(upload, port))
        grown = max(peak) - before
        assert answer.json()["body_length"] == size
        assert answer.json()["body_sha256"] == expected.hexdigest()
        assert grown < 32 * 1024 * 1024


@pytest.mark.parametrize(
    "data",
    [
        request("GET", "/x", x_vllmsim="bytes; length=200000000"),
        post("/v1/completions", {"prompt": "x", "max_tokens": 32768, "stream": True}),
    ],
    ids=["bytes", "events"],
)
@pytest_twisted.ensureDeferred
async def test_a_reader_that_stalls_stops_the_writer(data: bytes) -> None:
    async with simulated() as (factory, port):
        client = await connected(port)
        transport: Any = client.transport
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        transport.write(data)
        await client.received(1000)
        transport.pauseProducing()
        (server,) = factory.connections
        buffered = -1
        while buffered != (buffered := _queued(server.transport)):
            await deferLater(reactor, 0.1)
        assert 0 < buffered < 400_000
        assert factory.stats.events < 32768
        await gone(client)
        await until(lambda: factory.stats.aborts == 1)


def _queued(transport: Any) -> int:
    return len(transport.dataBuffer) - transport.offset + transport._tempDataLen


@pytest_twisted.ensureDeferred
async def test_many_bytes_arrive_as_they_should() -> None:
    size = 20_000_000
    async with simulated() as (_, port):
        client = await connected(port)
        client.transport.write(request("GET", "/x", x_vllmsim=f"bytes; length={size}"))  # type: ignore[union-attr]
        await client.received(size)
        body = client.data.partition(b"\r\n\r\n")[2]
        whole = b"".join(pattern(i, min(250_000, size - i)) for i in range(0, size, 250_000))
        assert hashlib.sha256(body).digest() == hashlib.sha256(whole).digest()
        await gone(client)


@pytest_twisted.ensureDeferred
async def test_a_tunnel_that_is_not_read_is_not_read_from_either() -> None:
    async with simulated() as (factory, port):
        client = await connected(port)
        handshake = {"connection": "upgrade", "upgrade": "websocket", "sec_websocket_version": "13"}
        data = request("GET", "/v1/realtime", x_vllmsim="raw", sec_websocket_key="x", **handshake)
        transport: Any = client.transport
        transport.write(data)
        await client.received(len(b"HTTP/1.1 101"))
        transport.pauseProducing()
        transport.write(b"x" * 50_000_000)
        (server,) = factory.connections
        seen = -1
        while seen != (seen := factory.stats.bytes_received):
            await deferLater(reactor, 0.1)
        assert seen < 45_000_000
        assert _queued(server.transport) < 400_000
        transport.resumeProducing()
        await client.received(50_000_000)
        await gone(client)


@pytest_twisted.ensureDeferred
async def test_the_port_closes_with_every_connection() -> None:
    async with simulated(ttft=1000.0) as (_, port):
        client = await connected(port)
        await ask(client, request("GET", "/health"))
        waiting: Deferred[None] = client.closed
        assert not waiting.called
    await ended(client)
