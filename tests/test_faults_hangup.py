"""Callers that hang up: the upstream's connection closes at once, wherever the exchange was, so vLLM stops."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from _asking import until
from _raw import CHUNKED, PATIENCE, MiB, Upstream, Wire, chunk, connect, request, settled
from _service import Twistd

STREAMING = request(b"POST", b"/vllm/v1/chat/completions", body=b'{"model":"m","messages":[],"stream":true}')
PLAIN = request(b"POST", b"/vllm/v1/chat/completions", body=b'{"model":"m","messages":[]}')
#: Far more than the promised 50 ms, for a loaded machine; what was measured is printed.
BOUND = 2.0


def fin(client: Wire) -> None:
    """A FIN, whatever is unread: closing outright would make it a reset."""
    client.half_close()


#: How a client can go.
WAYS: dict[str, Callable[[Wire], None]] = {"close": Wire.close, "fin": fin, "reset": Wire.reset}


def fill(client: Wire, data: bytes) -> None:
    """Send until nobody takes any more (in this thread: a socket in use elsewhere is not closed by closing it)."""
    client.sock.settimeout(0.5)
    with suppress(TimeoutError):
        client.pour(data, 100_000_000 // len(data))
        raise AssertionError("it was all taken")


class Scene:
    """One hang-up: the upstream says when it is ready to see it, and when it saw it."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.saw = threading.Event()
        self.at = 0.0
        self.wire: Wire | None = None

    def wait(self, wire: Wire) -> None:
        """In the script: let the client go, and note when that is seen."""
        self.wire = wire
        self.ready.set()
        self.at = wire.gone_at()
        self.saw.set()

    def leave(self, way: str, client: Wire, what: str) -> None:
        """In the test: hang up, and judge how long the upstream took to hear of it."""
        assert self.ready.wait(PATIENCE)
        began = time.monotonic()
        WAYS[way](client)
        assert self.saw.wait(PATIENCE), "the upstream's connection stayed open"
        print(f"hangup {what}, {way}: {(self.at - began) * 1000:.1f} ms")
        assert self.at - began < BOUND


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", [STREAMING, PLAIN], ids=["streaming", "plain"])
def test_during_prefill(upstream: Upstream, scripted_proxy: Twistd, scene: Scene, asked: bytes, way: str) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(asked)
        scene.leave(way, client, "before any byte of the answer")


@pytest.mark.parametrize("way", WAYS)
def test_after_the_head(upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED)
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(STREAMING)
        assert client.head().status == 200
        scene.leave(way, client, "between head and first event")


@pytest.mark.parametrize("way", WAYS)
def test_mid_stream_while_the_upstream_is_silent(
    upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str
) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED + chunk(b"data: 1\n\n"))
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(STREAMING)
        client.head()
        assert client.chunk() == b"data: 1\n\n"
        scene.leave(way, client, "mid-stream")


@pytest.mark.parametrize("way", WAYS)
def test_mid_stream_while_events_come(upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str) -> None:
    def feed(wire: Wire) -> None:
        with suppress(OSError):
            while not scene.saw.wait(0.005):
                wire.send(chunk(b"data: 1\n\n"))

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED)
        threading.Thread(target=feed, args=(wire,), daemon=True).start()
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(STREAMING)
        client.head()
        assert client.chunk() == b"data: 1\n\n"
        scene.leave(way, client, "mid-stream under way")


@pytest.mark.parametrize("way", WAYS)
def test_in_the_middle_of_a_body_with_a_length(
    upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str
) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(PLAIN)
        client.head()
        assert client.exactly(4) == b"half"
        scene.leave(way, client, "middle of a body")


@pytest.mark.parametrize("way", WAYS)
def test_while_its_answer_is_stalled_unread(upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str) -> None:
    sender: list[Wire] = []

    def feed(wire: Wire) -> None:
        with suppress(OSError):
            wire.pour(b"x" * 65536, 3200)

    def script(wire: Wire) -> None:
        wire.message()
        sender.append(wire)
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 209715200\r\n\r\n")
        threading.Thread(target=feed, args=(wire,), daemon=True).start()
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(PLAIN)
        client.head()
        stopped = settled(lambda: sender[0].sent, 0.5)
        assert 0 < stopped < 100 * MiB
        scene.leave(way, client, "stalled, answer unread")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 60_000], ids=["one", "many"])
def test_while_pipelined_requests_are_unread(
    upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str, size: int
) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        scene.wait(wire)

    behind = request(b"GET", b"/vllm/v1/models")
    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(STREAMING + behind * -(-size // len(behind)))
        scene.leave(way, client, f"{-(-size // len(behind))} pipelined requests unread")
        time.sleep(0.05)  # what came behind must not be asked for in the client's absence
        assert upstream.connections == 1


def test_a_reset_behind_a_full_receive_buffer(upstream: Upstream, scripted_proxy: Twistd, scene: Scene) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(STREAMING)
        assert scene.ready.wait(PATIENCE)
        fill(client, request(b"GET", b"/vllm/v1/models") * 1000)
        scene.leave("reset", client, "receive buffer full of pipelined requests")


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("way", WAYS)
def test_while_uploading(upstream: Upstream, scripted_proxy: Twistd, scene: Scene, way: str, framing: str) -> None:
    """The upstream must neither wait for the rest nor take what came for the whole."""
    ends: list[bytes] = []

    def script(wire: Wire) -> None:
        wire.head()
        wire.exactly(100_000)
        scene.wait(wire)
        with suppress(Exception):
            ends.append(wire.rest()[0])

    line = b"Content-Length: 10000000" if framing == "length" else b"Transfer-Encoding: chunked"
    with upstream.playing(script), connect(scripted_proxy) as client:
        body = os.urandom(100_000)
        client.send(request(b"POST", b"/vllm/v1/audio/transcriptions", line))
        client.send(body if framing == "length" else chunk(body))
        scene.leave(way, client, f"uploading ({framing})")
    assert not any(end.endswith(b"0\r\n\r\n") for end in ends)


def test_a_reset_while_the_upstream_does_not_read_the_upload(
    upstream: Upstream, scripted_proxy: Twistd, scene: Scene
) -> None:
    def script(wire: Wire) -> None:
        wire.head()
        scene.wait(wire)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(request(b"POST", b"/vllm/v1/audio/transcriptions", b"Content-Length: 1000000000"))
        fill(client, b"x" * 65536)
        scene.leave("reset", client, "upload stalled")


@pytest.mark.parametrize("stream", [b"true", b"false"])
@pytest.mark.parametrize("way", ["close", "reset"])
def test_vllm_counts_the_abort(sim: Twistd, proxy: Twistd, stream: bytes, way: str) -> None:
    def stats() -> dict[str, int]:
        answer = sim.get_json("/vllmsim/stats")
        assert isinstance(answer, dict)
        return answer

    before = stats()
    body = b'{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"hi"}],"max_tokens":4000,"stream":%s}'
    with connect(proxy) as client:
        client.send(request(b"POST", b"/vllm/v1/chat/completions", b"X-Vllmsim: tpot=0.05", body=body % stream))
        if stream == b"true":
            assert client.head().status == 200
            assert client.chunk()
        until(lambda: stats()["running"] == before["running"] + 1)
        WAYS[way](client)
        until(lambda: stats()["aborts"] == before["aborts"] + 1)
        assert stats()["running"] == before["running"]


def test_the_access_record_says_that_the_client_left(upstream: Upstream, scripted_proxy: Twistd, scene: Scene) -> None:
    def script(wire: Wire) -> None:
        wire.message()
        scene.wait(wire)

    def mine() -> list[dict[str, object]]:
        return [r for r in scripted_proxy.access_records if r.get("request_id") == "left-during-prefill"]

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(PLAIN.replace(b"\r\n\r\n", b"\r\nX-Request-Id: left-during-prefill\r\n\r\n", 1))
        scene.leave("close", client, "recorded")
        until(lambda: bool(mine()))
    assert [record["ended"] for record in mine()] == ["client_gone"]
