"""Upstream connections on real sockets: a reset that is found by writing, before anything was read of it."""

import select
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from _memory import ORIGIN, Body, Pending
from _raw import Wire
from _reactor import reactor, until
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import deferLater

from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.answer import AnswerLost, OutgoingHeaders
from vllmproxy.http1.sockets import raw_socket
from vllmproxy.turn import turn

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSING = b"HTTP/1.1 200 OK\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
REFUSAL = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"


class Upstream:
    """An agent, and a listener that is the test.

    :ivar sock: the upstream's end of the connection accepted last.
    """

    sock: socket.socket

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self._listener.getsockname()[1])
        self.agent = UpstreamAgent(reactor, endpoint, ORIGIN)

    async def ask(self, body: Any = None, *, upgrade: bool = False) -> Pending:
        """Send a request on a new connection."""
        headers = OutgoingHeaders(b"host: vllm\r\n", upgrade=upgrade)
        pending = Pending(self.agent.request(b"POST" if body else b"GET", ORIGIN + b"/", headers, body))
        await until(lambda: bool(select.select([self._listener], [], [], 0)[0]))
        self.sock, _ = self._listener.accept()
        await until(lambda: bool(select.select([self.sock], [], [], 0)[0]))
        assert self.sock.recv(65_536)
        return pending

    def reset(self, transport: Any) -> None:
        """Reset, and wait until the other end's kernel knows; the reactor does not turn meanwhile."""
        Wire(self.sock).reset()
        sock = raw_socket(transport)
        assert sock is not None
        end = time.monotonic() + 20
        while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 7:  # TCP_CLOSE
            assert time.monotonic() < end

    def close(self) -> None:
        self.agent.close()
        self._listener.close()
        self.sock.close()


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    made = Upstream()
    yield made
    made.close()
    await deferLater(reactor, 0.02, lambda: None)


@pytest.mark.parametrize("last", [b"", b"more"])
@pytest_twisted.ensureDeferred
async def test_a_reset_is_not_the_end_of_an_answer_that_ends_with_its_connection(last: bytes) -> None:
    """The kernel tells the write of it, and who reads then finds what looks like a FIN."""
    async with upstream() as server:
        body = Body()
        pending = await server.ask(body)
        server.sock.sendall(CLOSING + b"part")
        await until(lambda: pending.receiver.body == b"part")
        server.sock.sendall(last)
        (connection,) = server.agent._busy
        server.reset(connection.transport)
        body.consumer.write(b"upload")
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.events == ["answer_failed"]
        assert pending.receiver.reasons[0].check(AnswerLost)
        assert pending.receiver.body == b"part" + last


@pytest_twisted.ensureDeferred
async def test_an_answer_before_a_reset_arrives() -> None:
    async with upstream() as server:
        body = Body()
        pending = await server.ask(body)
        server.sock.sendall(REFUSAL)
        (connection,) = server.agent._busy
        server.reset(connection.transport)
        body.consumer.write(b"upload")
        await until(lambda: pending.whole is not None)
        assert pending.answer is not None
        assert (pending.answer.code, pending.whole) == (413, b"no")
        assert body.calls[-1] == "stop"
        assert server.agent.is_idle


@pytest_twisted.ensureDeferred
async def test_a_tunnels_last_words_before_a_reset_arrive() -> None:
    async with upstream() as server:
        pending = await server.ask(upgrade=True)
        server.sock.sendall(SWITCH)
        await until(lambda: pending.answer is not None)
        assert pending.answer is not None
        connection = pending.answer.connection
        server.sock.sendall(b"last words")
        server.reset(connection.transport)
        connection.write(b"x")
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.body == b"last words"
        assert pending.receiver.events == ["answer_failed"]


@pytest_twisted.ensureDeferred
async def test_what_a_reader_that_paused_left_is_not_read() -> None:
    async with upstream() as server:
        pending = await server.ask(upgrade=True)
        server.sock.sendall(SWITCH)
        await until(lambda: pending.answer is not None)
        assert pending.answer is not None
        connection = pending.answer.connection
        connection.pause_answer()
        server.sock.sendall(b"last words")
        server.reset(connection.transport)
        connection.write(b"x")
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.body == b""
        assert pending.receiver.events == ["answer_failed"]


@pytest_twisted.ensureDeferred
async def test_an_upstream_hears_at_once_that_its_request_is_taken_back() -> None:
    """Before anything else that is to be done in this turn of the reactor."""
    async with upstream() as server:
        pending = await server.ask()
        pending.asked.cancel()
        assert select.select([server.sock], [], [], 20)[0]
        with pytest.raises(ConnectionResetError):
            server.sock.recv(1)
        assert server.agent.is_idle


@pytest.mark.parametrize(("ago", "seen"), [(-60.0, False), (0.0, True)])
@pytest_twisted.ensureDeferred
async def test_a_polls_word_on_an_idle_connection_holds_for_a_moment(
    ago: float, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn in which much is to be done may be long."""
    async with upstream() as server:
        pending = await server.ask()
        server.sock.sendall(OK)
        await until(lambda: pending.whole == b"ok")
        (connection,) = server.agent._idle
        server.sock.sendall(b"nobody asked for this")
        assert select.select([raw_socket(connection.transport)], [], [], 20)[0]
        monkeypatch.setattr(turn, "number", turn.number + 1)
        monkeypatch.setattr(turn, "holds_until", time.monotonic() - ago)
        assert connection.has_ended() is seen
