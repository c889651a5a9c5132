"""The TLS listener: streams and tunnels pass, hang-ups are noticed, and no plain byte is ever on the wire."""

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from _asking import until
from _ports import free_port
from _raw import CHUNKED, LAST_CHUNK, PATIENCE, MiB, Upstream, Wire, chunk, each_request, request, settled
from _service import Twistd, start_proxy

MARKER = b"MARKER-of-what-must-be-secret-0123456789"
CHAT = request(b"POST", b"/vllm/v1/chat/completions", body=b'{"model":"m","stream":true,"x":"%s"}' % MARKER)
WANTS = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
HANDSHAKE = request(b"GET", b"/vllm/v1/realtime", *WANTS)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


class Secure:
    """A proxy that listens with TLS."""

    def __init__(self, service: Twistd, port: int, trust: ssl.SSLContext) -> None:
        self.service = service
        self.port = port
        self.trust = trust

    def listens(self) -> bool:
        """Whether its port accepts yet."""
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def connect(self, port: int | None = None) -> Wire:
        """Connect, by way of a relay if ``port`` is given."""
        sock = socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Wire(self.trust.wrap_socket(sock, server_hostname="proxy.test"))


@pytest.fixture(scope="module")
def secure(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    directory: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("proxy.test")
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    port = free_port()
    listen = f"ssl:{port}:privateKey={directory}/key.pem:certKey={directory}/cert.pem:interface=127.0.0.1"
    service = start_proxy(directory, upstream.url, "--listen", listen)
    proxy = Secure(service, port, trust)
    until(proxy.listens)
    yield proxy
    service.stop()
    assert "Traceback" not in service.log


class Recorder:
    """A TCP relay that keeps what passed, both ways."""

    def __init__(self, port: int) -> None:
        self.up, self.down = bytearray(), bytearray()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=_copy, args=(client, server, self.up), daemon=True).start()
            _copy(server, client, self.down)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def _copy(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            record += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def check_wire(recorder: Recorder) -> None:
    """TLS records and nothing else: neither the marker nor a word of HTTP."""
    for record in (recorder.up, recorder.down):
        for word in (MARKER, b"HTTP/1.1", b"authorization", b"data:", b"content-"):
            assert word not in bytes(record)
        position = 0
        while position < len(record):
            assert record[position] in (20, 21, 22, 23)
            assert record[position + 1] == 3
            position += 5 + int.from_bytes(record[position + 3 : position + 5], "big")
        assert position == len(record)


def test_a_streamed_answer_is_ciphertext_from_end_to_end(upstream: Upstream, secure: Secure) -> None:
    confirmed = threading.Semaphore(0)

    def script(wire: Wire) -> None:
        assert MARKER in wire.message().body
        wire.send(CHUNKED)
        for _ in range(20):
            assert confirmed.acquire(timeout=PATIENCE)
            wire.send(chunk(b"data: %s\n\n" % MARKER))
        wire.send(LAST_CHUNK)

    with upstream.playing(script), Recorder(secure.port) as recorder:
        with secure.connect(recorder.port) as client:
            client.send(CHAT)
            assert client.head().status == 200
            for _ in range(20):
                confirmed.release()
                assert client.chunk() == b"data: %s\n\n" % MARKER
            assert client.chunk() == b""
        check_wire(recorder)


def test_a_websocket_is_ciphertext_from_end_to_end(upstream: Upstream, secure: Secure) -> None:
    sent = MARKER + os.urandom(MiB) + MARKER

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        wire.send(wire.exactly(len(sent)))
        assert wire.rest()[0] == b""  # by FIN or RST: the client's end may look cut off to TLS

    with upstream.playing(script), Recorder(secure.port) as recorder:
        with secure.connect(recorder.port) as client:
            client.send(HANDSHAKE)
            assert client.head().status == 101
            client.send(sent)
            assert client.exactly(len(sent)) == sent
            client.close()
        check_wire(recorder)


def test_keep_alive_refusals_and_our_own_answers(upstream: Upstream, secure: Secure) -> None:
    with upstream.playing(each_request()), Recorder(secure.port) as recorder:
        with secure.connect(recorder.port) as client:
            for _ in range(3):
                client.send(CHAT + request(b"GET", b"/vllm/v1/models", key=b"X-Api-Key: sk-wrong"))
                assert client.message().body == b"ok"
                assert client.message().status == 401
            client.send(request(b"GET", b"/health/liveliness"))
            assert client.message().status == 200
        check_wire(recorder)


def test_a_stalled_reader_stops_the_upstream(upstream: Upstream, secure: Secure) -> None:
    block, count = os.urandom(65536), 1600
    wires: list[Wire] = []

    def script(wire: Wire) -> None:
        wires.append(wire)
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(block) * count))
        wire.pour(block, count)

    before = secure.service.rss()
    with upstream.playing(script), secure.connect() as client:
        client.send(CHAT)
        assert client.head().status == 200
        assert settled(lambda: wires[0].sent) < 40 * MiB
        assert secure.service.rss() - before < 40 * MiB
        for _ in range(count):
            assert client.exactly(len(block)) == block


def unwrap(client: Wire) -> None:
    """Close as TLS wants it, with a close_notify, without waiting for the other side's."""
    assert isinstance(client.sock, ssl.SSLSocket)
    client.sock.settimeout(0)
    with suppress(OSError):
        client.sock.unwrap()
    client.close()


WAYS = {"close": Wire.close, "close_notify": unwrap, "reset": Wire.reset}


@pytest.mark.parametrize("behind", [b"", request(b"GET", b"/vllm/v1/models") * 100], ids=["alone", "pipelined"])
@pytest.mark.parametrize("answer", [b"", CHUNKED + chunk(b"data: 1\n\n")], ids=["prefill", "mid-stream"])
@pytest.mark.parametrize("way", WAYS)
def test_hanging_up(upstream: Upstream, secure: Secure, answer: bytes, way: str, behind: bytes) -> None:
    ready, saw = threading.Event(), threading.Event()
    at: list[float] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(answer)
        ready.set()
        at.append(wire.gone_at())
        saw.set()

    with upstream.playing(script), secure.connect() as client:
        client.send(CHAT + behind)
        assert ready.wait(PATIENCE)
        if answer:
            assert client.head().status == 200
            assert client.chunk() == b"data: 1\n\n"
        began = time.monotonic()
        WAYS[way](client)
        assert saw.wait(PATIENCE)
        print(f"hangup over TLS, {way}, {len(behind)} bytes unread: {(at[0] - began) * 1000:.1f} ms")
        assert at[0] - began < 2.0


def test_an_upstream_that_dies_mid_stream_leaves_no_last_chunk(upstream: Upstream, secure: Secure) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED + chunk(b"data: 1\n\n"))
        wire.close()

    with upstream.playing(script), secure.connect() as client:
        client.send(CHAT)
        data = b""
        with suppress(ssl.SSLError, ConnectionError):
            while piece := client.sock.recv(65536):
                data += piece
        assert not data.endswith(LAST_CHUNK)


@pytest.mark.parametrize("fin", [False, True])
def test_a_stalled_reader_that_says_goodbye_and_takes_the_rest(upstream: Upstream, secure: Secure, fin: bool) -> None:
    """vLLM is told, though the client closes with no more than a close_notify, and while its answer is held back."""
    block, count = os.urandom(65536), 1600
    wires: list[Wire] = []
    gone = threading.Event()

    def script(wire: Wire) -> None:
        wires.append(wire)
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(block) * count))
        with suppress(OSError):
            wire.pour(block, count)
        gone.set()

    with upstream.playing(script), secure.connect() as client:
        client.send(CHAT)
        assert client.head().status == 200
        assert settled(lambda: wires[0].sent) < 40 * MiB
        assert isinstance(client.sock, ssl.SSLSocket)
        client.sock.settimeout(0)
        with suppress(ssl.SSLError):
            client.sock.unwrap()
        client.sock.settimeout(PATIENCE)
        if fin:
            client.half_close()
        time.sleep(0.1)  # it is read before the queue has left
        with suppress(ConnectionError):
            while socket.socket.recv(client.sock, 65536):  # what TLS makes of it is of no interest
                pass
        assert gone.wait(PATIENCE)
        assert wires[0].sent < len(block) * count
