"""The server channel on real sockets: slow readers, hang-ups behind unread bytes, half-closes."""

import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from _reactor import reactor, until
from _site import Filler, send, site
from twisted.internet.error import ConnectionDone
from twisted.internet.task import deferLater

from vllmproxy.http1 import factory, sockets
from vllmproxy.http1.server import HOLD
from vllmproxy.http1.sockets import LONG_READ, raw_socket
from vllmproxy.turn import turn

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
CLOSING = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
WEBSOCKET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"


async def some(sock: socket.socket) -> bytes:
    """Return the next bytes, ``b""`` at their end."""
    data: list[bytes] = []

    def readable() -> bool:
        with suppress(BlockingIOError):
            data.append(sock.recv(65_536))
        return bool(data)

    await until(readable)
    return data[0]


@pytest_twisted.ensureDeferred
async def test_a_slow_reader_is_no_stalled_one() -> None:
    """It takes bytes all the time, though the kernel's buffer is too full for us to add to it."""
    async with site(write_timeout=0.5) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        Filler(stream, 50_000_000)
        assert server.factory.channels.copy().pop().congested
        end = time.monotonic() + 3
        while time.monotonic() < end:
            await deferLater(reactor, 0.02, lambda: None)
            assert sock.recv(4096)
        assert not stream.over
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_stalled_reader_is_let_go() -> None:
    async with site(write_timeout=0.2) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        Filler(stream, 50_000_000)
        await until(lambda: stream.over)
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]
        sock.close()


@pytest.mark.parametrize("size", [200_000, 3_000_000])
@pytest_twisted.ensureDeferred
async def test_a_long_body_is_read_in_long_pieces_while_it_is_wanted(size: int) -> None:
    async with site() as server:
        sock = server.connect()
        body = bytes(range(250)) * (size // 250)
        head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size
        stream = await server.ask(sock, head + body[:100])
        transport: Any = stream.channel.transport
        short = transport.bufferSize
        stream.read_body()
        assert transport.bufferSize == (LONG_READ if size > 1_000_000 else short)
        stream.pause_body()
        assert transport.bufferSize == short
        stream.resume_body()
        await send(sock, body[100:])
        await until(lambda: stream.complete)
        receiver: Any = stream.receiver
        assert receiver.body == body
        assert transport.bufferSize == short
        sock.close()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("unread", [b"", GET, b"x" * 10])
@pytest_twisted.ensureDeferred
async def test_a_client_that_hangs_up_is_noticed_at_once(how: str, unread: bytes) -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, GET)
        if unread:
            sock.send(unread)
        await deferLater(reactor, 0.02, lambda: None)
        if how == "rst":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        gone = time.monotonic()
        await until(lambda: stream.over)
        assert time.monotonic() - gone < 1
        assert stream.receiver.events.count("client_gone") == 1  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_client_that_hangs_up_behind_an_upload_that_nobody_reads() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10000000\r\n\r\n")
        await send(sock, b"x" * 70_000)
        await until(lambda: stream.held_bytes >= HOLD)
        held = stream.held_bytes
        await send(sock, b"x" * 10_000)  # stays in the kernel's buffer, and the FIN behind it
        sock.close()
        await until(lambda: stream.over)
        assert stream.held_bytes == held
        assert stream.receiver.events == ["client_gone"]  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_refusal_survives_an_upload_that_goes_on() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
        stream.respond(401, b"Unauthorized", b"", b"no")
        for _ in range(10):
            await send(sock, b"x" * 100_000)
        received = b""
        while piece := sock.recv(65_536):
            received += piece
        assert received.startswith(b"HTTP/1.1 401 ")
        assert received.endswith(b"no")
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_tunnel_half_closes_on_plain_sockets() -> None:
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(
            sock, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        stream.start_tunnel(b"S", b"")
        sock.shutdown(socket.SHUT_WR)
        receiver: Any = stream.receiver
        await until(lambda: receiver.events == ["tunnel_half_closed"])
        stream.pause_body()
        stream.write_raw(b"still here")
        stream.resume_body()
        stream.half_close()
        await until(lambda: "client_gone" in receiver.events)
        assert sock.recv(1000).endswith(b"\r\n\r\nstill here")
        assert sock.recv(1) == b""
        sock.close()


@pytest.mark.parametrize("half", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_slow_reader_of_the_last_answer_has_all_of_it(half: bool) -> None:
    """The idle timeout is for what comes between requests, and what is left to read may take longer."""
    async with site(write_timeout=0.5, idle_timeout=0.2) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, CLOSING if not half else WEBSOCKET)
        if half:
            stream.start_tunnel(b"S", b"")
            stream.write_raw(b"x" * 5_000_000)
            stream.half_close()
        else:
            stream.respond(200, b"OK", b"", b"x" * 5_000_000)
        received, end = 0, time.monotonic() + 1.5
        while time.monotonic() < end:
            await deferLater(reactor, 0.02, lambda: None)
            received += len(sock.recv(4096))
        while data := await some(sock):
            received += len(data)
        assert received > 5_000_000
        sock.close()


@pytest.mark.parametrize("half", [False, True])
@pytest_twisted.ensureDeferred
async def test_a_stalled_reader_of_the_last_answer_is_let_go(half: bool) -> None:
    async with site(write_timeout=0.2) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, CLOSING if not half else WEBSOCKET)
        if half:
            stream.start_tunnel(b"S", b"")
            stream.write_raw(b"x" * 5_000_000)
            server.factory.write_deadlines.clear(stream.channel)  # as if it had read until now
            stream.half_close()
        else:
            stream.respond(200, b"OK", b"", b"x" * 5_000_000)
        await until(lambda: not server.factory.channels)
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_tunnel_that_was_half_closed_behind_a_slow_reader_goes_on() -> None:
    async with site(write_timeout=0.2) as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, WEBSOCKET)
        receiver: Any = stream.receiver
        stream.start_tunnel(b"S", b"")
        stream.write_raw(b"x" * 5_000_000)
        stream.half_close()
        while await some(sock):
            pass
        await deferLater(reactor, 1, lambda: None)
        await send(sock, b"still here")
        await until(lambda: receiver.body == b"still here")
        sock.close()


@pytest_twisted.ensureDeferred
async def test_a_tunnels_last_words_before_a_reset_arrive() -> None:
    """The reset is found by writing, before they were read."""
    async with site() as server:
        sock = server.connect()
        stream = await server.ask(sock, WEBSOCKET)
        receiver: Any = stream.receiver
        stream.start_tunnel(b"S", b"")
        ours = raw_socket(stream.channel.transport)
        assert ours is not None
        sock.send(b"last words")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        end = time.monotonic() + 20
        while ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 7:  # TCP_CLOSE
            assert time.monotonic() < end
        stream.write_raw(b"x")
        await until(lambda: stream.over)
        assert receiver.body == b"last words"
        assert receiver.events == ["client_gone"]
        assert not receiver.reasons[0].check(ConnectionDone)


@pytest.mark.parametrize("size", [2, 200_000])
@pytest_twisted.ensureDeferred
async def test_an_answer_that_is_on_its_way_outlives_its_connections_place(size: int) -> None:
    """A new connection may come in the turn of the reactor in which the answer ended: it is kept until that is over, or
    in the kernel. Its client is told by a FIN, not by a reset, which would take it back."""
    async with site() as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        (channel,) = server.factory.channels
        turn.begin({})
        stream.respond(200, b"OK", b"", b"x" * size)
        channel.evict()
        turn.end()
        assert not server.factory.channels  # its descriptor is free, though the client has not read all of it
        received = b""
        while data := await some(sock):
            received += data
        assert received.endswith(b"\r\n\r\n" + b"x" * size)
        sock.close()


@pytest.mark.parametrize("status", [200, 401])
@pytest.mark.parametrize("lines", [b"", b"Connection: close\r\n"], ids=["idle", "closing"])
@pytest.mark.parametrize("grace", [3600.0, 0.0])
@pytest_twisted.ensureDeferred
async def test_an_answer_is_not_lost_for_a_new_connection_while_its_client_may_be_reading_it(
    status: int, lines: bytes, grace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal may be: else who is refused again and again would keep all others out."""
    monkeypatch.setattr(factory, "GRACE", grace)
    async with site(max_connections=1) as server:
        slow = server.connect(receive_buffer=16_384)
        stream = await server.ask(slow, GET.replace(b"\r\n\r\n", b"\r\n%b\r\n" % lines))
        stream.respond(status, b"So", b"", b"x" * 8_000_000)
        newcomer = server.connect()
        (await server.ask(newcomer, GET)).respond(200, b"OK", b"", b"ok")
        assert (await some(newcomer)).endswith(b"ok")
        size = 0
        with suppress(ConnectionResetError):
            while size < 8_000_000 and (data := await some(slow)):
                size += len(data)
        assert (size > 8_000_000) is (status == 200 and grace > 0)
        assert server.factory.evicted == (size < 8_000_000)
        for sock in (slow, newcomer):
            sock.close()


@pytest_twisted.ensureDeferred
async def test_a_connection_that_closes_in_this_turn_keeps_its_place_until_its_answer_has_left() -> None:
    async with site(max_connections=1) as server:
        sock = server.connect()
        stream = await server.ask(sock, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        turn.begin({})
        stream.respond(200, b"OK", b"", b"ok")
        (channel,) = server.factory.channels
        assert channel.is_sending
        assert not server.factory._evict()
        turn.end()
        assert (await some(sock)).endswith(b"\r\n\r\nok")
        sock.close()


def unread(port: int) -> int:
    """Return how many connections from a port the kernel keeps for what their peers did not read (FIN_WAIT1)."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == "04" for line in lines)


@pytest.mark.parametrize("how", ["evicted", "closed"])
@pytest_twisted.ensureDeferred
async def test_the_kernel_keeps_nothing_for_a_client_that_does_not_read(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would for ever, and nobody would count it: such a client confirms that there is no room."""
    monkeypatch.setattr(sockets, "SLOWEST", 0.5)
    async with site(write_timeout=0.5) as server:
        sock = server.connect(receive_buffer=4096)
        last = b"" if how == "evicted" else b"Connection: close\r\n"
        stream = await server.ask(sock, GET.replace(b"\r\n\r\n", b"\r\n%b\r\n" % last))
        (channel,) = server.factory.channels
        stream.respond(200, b"OK", b"", b"x" * 200_000)
        if how == "evicted":
            channel.evict()
        await until(lambda: not server.factory.channels)
        port = server.port.getHost().port
        assert unread(port) == 1
        await until(lambda: not unread(port))
        sock.close()


@pytest.mark.parametrize("write_timeout", [1e-9, 1e12])
@pytest_twisted.ensureDeferred
async def test_any_write_timeout_lets_a_connection_close(write_timeout: float) -> None:
    async with site(write_timeout=write_timeout) as server:
        for evicted in (True, False):
            sock = server.connect()
            stream = await server.ask(sock, GET if evicted else GET.replace(b"1.1", b"1.0"))
            (channel,) = server.factory.channels
            stream.respond(200, b"OK", b"", b"ok")
            if evicted:
                channel.evict()
            await until(lambda: not server.factory.channels)
            assert (await some(sock)).endswith(b"\r\n\r\nok")
            sock.close()


@pytest_twisted.ensureDeferred
async def test_who_does_not_read_an_answer_loses_it_with_the_place() -> None:
    """What the kernel does not take would hold the connection for as long as its client likes."""
    async with site() as server:
        sock = server.connect(receive_buffer=16_384)
        stream = await server.ask(sock, GET)
        (channel,) = server.factory.channels
        stream.respond(200, b"OK", b"", b"x" * 50_000_000)
        channel.evict()
        assert not server.factory.channels
        sock.close()
