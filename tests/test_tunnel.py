"""WebSocket: the handshake passes, then bytes both ways with backpressure until either side ends; else it is HTTP."""

import hashlib
import os
import threading

import pytest
from _asking import until
from _raw import OK, PATIENCE, Ended, Message, MiB, Upstream, Wire, connect, each_request, request, settled
from _service import Twistd

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 §1.3
WANTS = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + KEY)
HANDSHAKE = request(b"GET", b"/vllm/v1/realtime?model=m", *WANTS)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\nX-From: upstream\r\n\r\n"
)
GET = request(b"GET", b"/vllm/v1/models")
BLOCK = os.urandom(65536)


def switched(client: Wire) -> Message:
    """Shake hands."""
    client.send(HANDSHAKE)
    answer = client.head()
    assert answer.status == 101
    return answer


def masked(opcode: int, payload: bytes) -> bytes:
    """Return a client's frame of fewer than 126 bytes."""
    mask = os.urandom(4)
    return bytes((0x80 | opcode, 0x80 | len(payload))) + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload))


def test_the_handshake_passes_both_ways(upstream: Upstream, scripted_proxy: Twistd) -> None:
    seen: list[Message] = []

    def script(wire: Wire) -> None:
        seen.append(wire.message())
        wire.send(SWITCH)
        wire.rest()

    with upstream.playing(script), connect(scripted_proxy) as client:
        answer = switched(client)
        assert answer.get(b"sec-websocket-accept") == ACCEPT
        assert answer.get(b"upgrade").lower() == b"websocket"
        assert answer.get(b"connection").lower() == b"upgrade"
        assert answer.get(b"x-from") == b"upstream"
    asked = seen[0]
    assert asked.start == b"GET /v1/realtime?model=m HTTP/1.1"
    assert asked.get(b"upgrade").lower() == b"websocket"
    assert b"upgrade" in asked.get(b"connection").lower()
    assert asked.get(b"sec-websocket-key") == KEY
    assert asked.get(b"sec-websocket-version") == b"13"
    assert not asked.get(b"authorization")


def test_the_simulators_echo_through_the_proxy(proxy: Twistd) -> None:
    with connect(proxy) as client:
        assert switched(client).get(b"sec-websocket-accept") == ACCEPT
        client.send(masked(1, b"hello"))
        assert client.exactly(7) == b"\x81\x05hello"
        client.send(masked(8, b"\x03\xe8"))
        assert client.exactly(4) == b"\x88\x02\x03\xe8"
        assert client.rest() == (b"", "fin")


def test_a_handshake_without_a_key_is_refused(upstream: Upstream, scripted_proxy: Twistd) -> None:
    with upstream.playing(each_request(SWITCH)), connect(scripted_proxy) as client:
        client.send(request(b"GET", b"/vllm/v1/realtime", *WANTS, key=b"X: y"))
        assert client.message().status == 401
        assert upstream.connections == 0


def test_nothing_is_forwarded_before_the_101(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """The client does not wait: its first frames reach the upstream after the 101, all of them, in order."""
    early = [HANDSHAKE, b"early frames " * 100, b"more " * 40_000, b"end"]

    def script(wire: Wire) -> None:
        wire.message()
        assert not wire.readable(1.0), "bytes before the 101"
        wire.send(SWITCH + b"hello")
        assert wire.exactly(len(b"".join(early[1:]))) == b"".join(early[1:])
        wire.send(b"thanks")

    with upstream.playing(script), connect(scripted_proxy) as client:
        sending = threading.Thread(target=lambda: [client.send(piece) for piece in early], daemon=True)
        sending.start()
        assert client.head().status == 101
        assert client.exactly(11) == b"hellothanks"
        sending.join(PATIENCE)


def test_a_megabyte_each_way_at_once(upstream: Upstream, scripted_proxy: Twistd) -> None:
    up, down = os.urandom(MiB), os.urandom(MiB)
    received: list[bytes] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        sending = threading.Thread(target=wire.send, args=(down,), daemon=True)
        sending.start()
        received.append(wire.exactly(len(up)))
        sending.join(PATIENCE)
        wire.send(b"over")

    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        sending = threading.Thread(target=client.send, args=(up,), daemon=True)
        sending.start()
        assert client.exactly(len(down)) == down
        assert client.exactly(4) == b"over"
        sending.join(PATIENCE)
    assert received == [up]


def digest_of(wire: Wire, size: int) -> str:
    """Read that many bytes and return their hash."""
    digest = hashlib.sha256()
    while size:
        piece = wire.some(min(size, MiB))
        assert piece
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


COUNT = 1600  # 100 MiB
DIGEST = hashlib.sha256(BLOCK * COUNT).hexdigest()


def test_a_client_that_does_not_read_stops_the_upstream(upstream: Upstream, scripted_proxy: Twistd) -> None:
    wires: list[Wire] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        wires.append(wire)
        wire.pour(BLOCK, COUNT)

    before = scripted_proxy.rss()
    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        until(lambda: bool(wires))
        assert settled(lambda: wires[0].sent) < 40 * MiB
        assert scripted_proxy.rss() - before < 20 * MiB
        assert digest_of(client, COUNT * len(BLOCK)) == DIGEST
    assert scripted_proxy.rss() - before < 20 * MiB


def test_an_upstream_that_does_not_read_stops_the_client(upstream: Upstream, scripted_proxy: Twistd) -> None:
    go_on = threading.Event()
    digests: list[str] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        assert go_on.wait(PATIENCE)
        digests.append(digest_of(wire, COUNT * len(BLOCK)))
        wire.send(b"all")

    before = scripted_proxy.rss()
    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        pouring = threading.Thread(target=client.pour, args=(BLOCK, COUNT), daemon=True)
        pouring.start()
        assert settled(lambda: client.sent) < 40 * MiB
        assert scripted_proxy.rss() - before < 20 * MiB
        go_on.set()
        assert client.exactly(3) == b"all"
        pouring.join(PATIENCE)
    assert digests == [DIGEST]
    assert scripted_proxy.rss() - before < 20 * MiB


def test_a_client_that_half_closes_still_hears(upstream: Upstream, scripted_proxy: Twistd) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        said, how = wire.rest()
        assert (said, how) == (b"my last word", "fin")
        for _ in range(3):
            wire.send(BLOCK)
        wire.close()

    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        client.send(b"my last word")
        client.half_close()
        assert client.rest() == (BLOCK * 3, "fin")


def test_an_upstream_that_half_closes_still_hears(upstream: Upstream, scripted_proxy: Twistd) -> None:
    heard: list[tuple[bytes, str]] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH + b"my last word")
        wire.half_close()
        heard.append(wire.rest())

    with upstream.playing(script):
        with connect(scripted_proxy) as client:
            switched(client)
            assert client.rest() == (b"my last word", "fin")
            for _ in range(3):
                client.send(BLOCK)
        until(lambda: bool(heard))
    assert heard == [(BLOCK * 3, "fin")]


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_upstream_that_ends_ends_the_client(upstream: Upstream, scripted_proxy: Twistd, end: str) -> None:
    shaken = threading.Event()

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH + b"bye")
        assert shaken.wait(PATIENCE)
        wire.close() if end == "close" else wire.reset()

    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        assert client.exactly(3) == b"bye"
        shaken.set()
        rest, how = client.rest()
        assert rest == b""
        assert how == ("fin" if end == "close" else "reset")
        if end == "close":
            client.half_close()


@pytest.mark.parametrize("stalled", [False, True], ids=["idle", "client reads nothing"])
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_client_that_ends_ends_the_upstream(
    upstream: Upstream, scripted_proxy: Twistd, end: str, stalled: bool
) -> None:
    ended = threading.Event()
    wires: list[Wire] = []

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(SWITCH)
        wires.append(wire)
        try:
            wire.pour(BLOCK, COUNT if stalled else 0)
            wire.gone_at()
        except OSError:
            pass
        ended.set()

    with upstream.playing(script), connect(scripted_proxy) as client:
        switched(client)
        until(lambda: bool(wires))
        settled(lambda: wires[0].sent, 0.5)
        client.close() if end == "close" else client.reset()
        assert ended.wait(5)


REFUSALS = {
    "403": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno",
    "426": b"HTTP/1.1 426 Upgrade Required\r\nupgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nno",
    "200": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno",
    "404 chunked": b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_upgrade_is_plain_http_and_the_connection_goes_on(
    upstream: Upstream, scripted_proxy: Twistd, case: str, pipelined: bool
) -> None:
    def script(wire: Wire) -> None:
        try:
            while True:
                wire.send(REFUSALS[case] if wire.message().get(b"upgrade") else OK)
        except Ended:
            return

    with upstream.playing(script), connect(scripted_proxy) as client:
        for _ in range(2):
            client.send(HANDSHAKE + (GET if pipelined else b""))
            answer = client.message()
            assert (answer.status, answer.body) == (int(case[:3]), b"no")
            client.send(b"" if pipelined else GET)
            assert client.message().body == b"ok"


def test_the_simulators_refusal_passes(proxy: Twistd) -> None:
    with connect(proxy) as client:
        client.send(HANDSHAKE.replace(b"\r\n\r\n", b"\r\nX-Vllmsim: upgrade-refused\r\n\r\n"))
        assert client.message().status == 403
        client.send(GET)
        assert client.message().status == 200
