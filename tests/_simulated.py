"""Clients of the simulated vLLM: one in memory with a clock that stands still, one on real sockets."""

import json
from typing import Any

import httptools
from attrs import Factory, define
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, connect

from vllmproxy.simulator.server import SimulatorConfig, SimulatorFactory


@define
class Answer:
    """One parsed response, whole or as far as it came."""

    status: int = 0
    headers: list[tuple[str, str]] = Factory(list)
    body: bytes = b""
    complete: bool = False

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of every server-sent event; ``[DONE]`` as it is."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class _Reader:
    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_message_begin(self) -> None:
        self.answers.append(Answer())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answers[-1].headers.append((name.decode(), value.decode()))

    def on_headers_complete(self) -> None:
        self.answers[-1].status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.answers[-1].body += data

    def on_message_complete(self) -> None:
        self.answers[-1].complete = True


def parse(data: bytes) -> list[Answer]:
    """Parse a stream of responses; raises httptools' error for what is not HTTP."""
    reader = _Reader()
    reader.parser.feed_data(data)
    return reader.answers


def post(path: str, body: Any, **headers: str) -> bytes:
    """A JSON POST as bytes; header names come with underscores."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, data, **({"content_type": "application/json"} | headers))


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """A request as bytes; header names come with underscores."""
    lines = [f"{method} {path} HTTP/1.1", "host: sim.example"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Collector(Protocol):
    """Keeps what it receives; ``closed`` fires when the connection has ended, for the reason in ``lost``."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.closed: Deferred[None] = Deferred()
        self.lost: Failure | None = None
        self._wanted: list[tuple[int, Deferred[bytes]]] = []

    @property
    def data(self) -> bytes:
        return bytes(self._data)

    def forget(self) -> None:
        """Drop what has come so far."""
        self._data.clear()

    def dataReceived(self, data: bytes) -> None:
        self._data += data
        ready = [item for item in self._wanted if len(self._data) >= item[0]]
        self._wanted = [item for item in self._wanted if item not in ready]
        for _, deferred in ready:
            deferred.callback(self.data)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost = reason
        self.closed.callback(None)

    def received(self, count: int) -> "Deferred[bytes]":
        """Fires once that many bytes have come."""
        deferred: Deferred[bytes] = Deferred()
        self._wanted.append((count, deferred))
        self.dataReceived(b"")
        return deferred


class Memory:
    """A simulated vLLM and one client of it, in memory."""

    def __init__(self, **config: Any) -> None:
        self.clock = Clock()
        self.factory = SimulatorFactory(self.clock, SimulatorConfig(**config))
        self.stats = self.factory.stats
        self.connect()

    def connect(self) -> None:
        """Open a new connection; the old one stays what it is."""
        self.client = Collector()
        self.server = self.factory.buildProtocol(None)
        self.wire = FakeTransport(self.server, isServer=True)
        self.pump = connect(self.server, self.wire, self.client, FakeTransport(self.client, isServer=False))

    def send(self, data: bytes) -> list[Answer]:
        """Send and return every answer so far."""
        assert self.client.transport is not None
        self.client.transport.write(data)
        self.pump.flush()
        return self.answers()

    def ask(self, data: bytes) -> Answer:
        """Send one request and return the one answer to it."""
        self.client.forget()
        (answer,) = self.send(data)
        return answer

    def answers(self) -> list[Answer]:
        return parse(self.client.data)

    def wait(self, seconds: float) -> bytes:
        """Let time pass, and return what came in that time."""
        before = len(self.client.data)
        self.clock.advance(seconds)
        self.pump.flush()
        return self.client.data[before:]

    def leave(self) -> None:
        """The client closes."""
        assert self.client.transport is not None
        self.client.transport.loseConnection()
        self.pump.flush()
