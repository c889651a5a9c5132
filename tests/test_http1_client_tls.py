"""Upstream connections behind TLS on real sockets: the upstream's end in each of its forms, and our own."""

import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from _memory import ORIGIN, Body, Pending
from _reactor import reactor, until
from _tls import ENDS, Authority, TLSPeer
from twisted.internet.task import deferLater

from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.answer import AnswerLost, OutgoingHeaders
from vllmproxy.http1.bodies import WholeBody

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make()


class Upstream:
    """An agent, and a TLS listener that is the test.

    :ivar peer: the upstream's end of the connection accepted last.
    """

    peer: TLSPeer

    def __init__(self, authority: Authority, **timeouts: Any) -> None:
        self._authority = authority
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        endpoint = authority.endpoint(self._listener.getsockname()[1])
        self.agent = UpstreamAgent(reactor, endpoint, ORIGIN, **timeouts)

    async def ask(self, body: Any = None, *, upgrade: bool = False) -> Pending:
        """Send a request on a new connection, and shake hands."""
        headers = OutgoingHeaders(b"host: vllm\r\n", upgrade=upgrade)
        pending = Pending(self.agent.request(b"POST" if body else b"GET", ORIGIN + b"/", headers, body))
        await until(self._asked)
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        self.peer = TLSPeer(sock, self._authority.server, server_side=True)
        await self.peer.handshake()
        assert (await self.peer.receive()).startswith(b"POST" if body else b"GET")
        return pending

    def _asked(self) -> bool:
        return bool(select.select([self._listener], [], [], 0)[0])

    async def tunnel(self) -> Pending:
        """Ask for a tunnel and get it."""
        pending = await self.ask(upgrade=True)
        await self.peer.send(SWITCH)
        await until(lambda: pending.answer is not None)
        return pending

    def close(self) -> None:
        self.agent.close()
        self._listener.close()
        self.peer.sock.close()


@asynccontextmanager
async def upstream_of(authority: Authority, **timeouts: Any) -> AsyncIterator[Upstream]:
    made = Upstream(authority, **timeouts)
    yield made
    made.close()
    await deferLater(reactor, 0.02, lambda: None)


class Greedy(Body):
    """Writes whenever it is not paused, and has no end."""

    def begin(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._fill()

    def _fill(self) -> None:
        for _ in range(200):
            if self.calls[-1:] in (["pause"], ["stop"]):
                return
            self._write(b"x" * 65_536)

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self._fill()

    async def stuck(self) -> None:
        """Wait until the upstream's not reading has come back to here."""
        last = -1
        while last != len(self.calls) or self.calls[-1] != "pause":
            last = len(self.calls)
            await deferLater(reactor, 0.1, lambda: None)


@pytest_twisted.ensureDeferred
async def test_a_body_in_pieces_arrives(authority: Authority) -> None:
    data = bytes(range(256)) * 4096
    async with upstream_of(authority) as upstream:
        await upstream.ask(WholeBody([memoryview(data)[:-1], data[-1:], b"end"], chunked=False))
        had = b""
        while not had.endswith(b"end"):
            had += await upstream.peer.receive()
        assert had.endswith(data[65_536:] + b"end")


@pytest_twisted.ensureDeferred
async def test_what_is_read_together_with_an_answer_is_not_the_next_answer(authority: Authority) -> None:
    """TLS hands on one record after the other, and the next request may be made at the end of the first."""
    async with upstream_of(authority) as upstream:
        pending = await upstream.ask()
        (connection,) = upstream.agent._busy
        behind: list[Pending] = []

        def ask_again() -> None:
            behind.append(Pending(upstream.agent.request(b"GET", ORIGIN + b"/", OutgoingHeaders(b"host: vllm\r\n"))))

        pending.receiver.answer_finished = ask_again  # type: ignore[method-assign]
        await upstream.peer.send(OK, OK)
        await until(upstream._asked)
        assert behind[0].answer is None
        await until(lambda: connection not in upstream.agent._busy)
        assert connection not in upstream.agent._idle


@pytest_twisted.ensureDeferred
async def test_a_connection_is_used_again(authority: Authority) -> None:
    async with upstream_of(authority) as upstream:
        pending = await upstream.ask()
        (connection,) = upstream.agent._busy
        await upstream.peer.send(OK)
        await until(lambda: pending.whole == b"ok" and connection in upstream.agent._idle)
        Pending(upstream.agent.request(b"GET", ORIGIN + b"/", OutgoingHeaders(b"host: vllm\r\n")))
        assert (await upstream.peer.receive()).startswith(b"GET")


@pytest.mark.parametrize("how", ENDS)
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_closes_on_a_paused_upload(how: str, authority: Authority) -> None:
    """Twisted resumes the producer of a connection that TLS is closing, and waits for it to end."""
    async with upstream_of(authority) as upstream:
        body = Greedy()
        pending = await upstream.ask(body)
        body.begin(body.consumer.write)
        await body.stuck()
        await upstream.peer.end(how)
        await until(lambda: pending.failure is not None)
        assert pending.error is AnswerLost
        assert body.calls[-1] == "stop"


@pytest.mark.parametrize("how", ENDS)
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_closes_a_paused_tunnel(how: str, authority: Authority) -> None:
    async with upstream_of(authority) as upstream:
        pending = await upstream.tunnel()
        assert pending.answer is not None
        body = Greedy()
        pending.answer.connection.registerProducer(body, True)
        body.begin(pending.answer.connection.write)
        await body.stuck()
        await upstream.peer.end(how)
        await until(lambda: bool(pending.receiver.events))
        clean = how in ("close_notify", "close_notify fin")
        assert pending.receiver.events == ["answer_finished"] or not clean


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("behind", [0, 300_000])
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_closes_a_paused_answer(ending: bool, behind: int, authority: Authority) -> None:
    """What it said before it closed is received when it is wanted, and then its end."""
    async with upstream_of(authority) as upstream:
        pending = await upstream.ask()
        await upstream.peer.send(b"HTTP/1.1 200 OK\r\n%s\r\n" % (b"" if ending else b"Content-Length: 1000000\r\n"))
        await until(lambda: pending.answer is not None)
        assert pending.answer is not None
        pending.answer.connection.pause_answer()
        await upstream.peer.send(b"x" * behind)
        await upstream.peer.close_notify()
        pending.answer.connection.resume_answer()
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.events == ["answer_finished" if ending else "answer_failed"]
        assert len(pending.receiver.body) == behind


@pytest.mark.parametrize("close", ["close", "half_close"])
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_never_says_goodbye(close: str, authority: Authority) -> None:
    """TLS waits for the answer to its close_notify, and nothing is queued that could stall."""
    async with upstream_of(authority, write_timeout=0.2) as upstream:
        pending = await upstream.tunnel()
        assert pending.answer is not None
        getattr(pending.answer.connection, close)()
        assert await upstream.peer.receive() == b""
        assert await upstream.peer.drain() == "reset"
        assert pending.receiver.events == ["answer_failed"]


@pytest.mark.parametrize("close", ["close", "half_close"])
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_reads_no_more(close: str, authority: Authority) -> None:
    async with upstream_of(authority, write_timeout=0.2) as upstream:
        pending = await upstream.tunnel()
        assert pending.answer is not None
        connection = pending.answer.connection
        for _ in range(200):
            connection.write(b"x" * 65_536)
        connection._deadlines.write.clear(connection)  # as if it had read until now
        getattr(connection, close)()
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.events == ["answer_failed"]


@pytest.mark.parametrize("close", ["close", "half_close"])
@pytest_twisted.ensureDeferred
async def test_an_upstream_that_takes_its_time_over_the_last_bytes(close: str, authority: Authority) -> None:
    async with upstream_of(authority, write_timeout=0.5) as upstream:
        pending = await upstream.tunnel()
        assert pending.answer is not None
        pending.answer.connection.write(b"x" * 3_000_000)
        getattr(pending.answer.connection, close)()
        received = 0
        while data := await upstream.peer.receive():
            received += len(data)
            await deferLater(reactor, 0.01, lambda: None)
        assert received == 3_000_000
        await upstream.peer.close_notify()
        await until(lambda: bool(pending.receiver.events))
        assert pending.receiver.events == ["answer_finished"]
