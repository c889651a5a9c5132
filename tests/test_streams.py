"""Answers that stream: each event at once, and a reader that stalls stops the upstream."""

import hashlib
import threading
import time

import pytest
from _raw import CHUNKED, LAST_CHUNK, PATIENCE, MiB, Upstream, Wire, chunk, connect, each_request, request, settled
from _service import Twistd

CHAT = request(b"POST", b"/vllm/v1/chat/completions", body=b'{"model":"m","messages":[],"stream":true}')
LENGTH = 200 * 1000 * 1000
BLOCK = bytes(range(250)) * 400  # 100 kB
READERS = 4


def lockstep(upstream: Upstream, proxy: Twistd, head: bytes, pieces: list[bytes], sent: list[bytes]) -> None:
    """Send ``head``, then each of ``sent`` only after the client has the piece before it in its hands."""
    confirmed = threading.Semaphore(0)

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(head)
        for piece in sent:
            assert confirmed.acquire(timeout=PATIENCE), "the client did not get what was sent before"
            wire.send(piece)
        confirmed.acquire(timeout=PATIENCE)
        wire.send(LAST_CHUNK if head is CHUNKED else b"")
        wire.close()

    with upstream.playing(script), connect(proxy) as client:
        client.send(CHAT)
        answer = client.head()
        assert answer.status == 200
        assert answer.get(b"content-type") == b"text/event-stream"
        confirmed.release()
        for piece in pieces:
            got = b""
            while len(got) < len(piece):
                got += client.chunk()
            assert got == piece
            confirmed.release()
        assert client.chunk() == b""


EVENTS = [
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    b": keep-alive\n\n",
    b'event: message\ndata: {"n":1}\n\n',
    b": keep-alive\n\n",
    b"data: [DONE]\n\n",
]


def test_each_event_and_comment_leaves_before_the_next_has_come(upstream: Upstream, scripted_proxy: Twistd) -> None:
    lockstep(upstream, scripted_proxy, CHUNKED, EVENTS, [chunk(event) for event in EVENTS])


def test_events_split_at_any_byte_leave_as_they_come(upstream: Upstream, scripted_proxy: Twistd) -> None:
    pieces = [event[i : i + 7] for event in EVENTS for i in range(0, len(event), 7)]
    lockstep(upstream, scripted_proxy, CHUNKED, pieces, [chunk(piece) for piece in pieces])


def test_an_event_leaves_when_its_chunk_is_not_over(upstream: Upstream, scripted_proxy: Twistd) -> None:
    whole = b"".join(EVENTS)
    first = b"%x\r\n%s" % (len(whole), EVENTS[0])
    lockstep(upstream, scripted_proxy, CHUNKED, EVENTS, [first, *EVENTS[1:-1], EVENTS[-1] + b"\r\n"])


def test_close_delimited_events_leave_at_once(upstream: Upstream, scripted_proxy: Twistd) -> None:
    head = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    lockstep(upstream, scripted_proxy, head, EVENTS, EVENTS)


def test_two_events_in_one_segment_arrive_whole_and_in_order(upstream: Upstream, scripted_proxy: Twistd) -> None:
    with (
        upstream.playing(each_request(CHUNKED + b"".join(map(chunk, EVENTS)) + LAST_CHUNK)),
        connect(scripted_proxy) as client,
    ):
        for _ in range(2):
            client.send(CHAT)
            assert client.message().body == b"".join(EVENTS)


def test_the_simulators_tokens_come_one_by_one(proxy: Twistd) -> None:
    """As a caller would see it: twenty tokens, each in a read of its own."""
    with connect(proxy) as client:
        body = (
            b'{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":20}'
        )
        lines = (b"X-Vllmsim: ttft=0.02;tpot=0.02;comments=0.01",)
        client.send(request(b"POST", b"/vllm/v1/chat/completions", *lines, body=body))
        assert client.head().status == 200
        chunks = list(iter(client.chunk, b""))
    assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
    assert any(piece.startswith(b":") for piece in chunks)
    assert len(chunks) >= 20


def stalled(proxy: Twistd, requested: bytes) -> list[Wire]:
    clients = [connect(proxy) for _ in range(READERS)]
    for client in clients:
        client.send(requested)
        assert client.head().status == 200
    return clients


def read_digest(client: Wire, length: int) -> str:
    """Read a body of that length to its end."""
    digest = hashlib.sha256()
    while length:
        piece = client.some(min(length, 1024 * 1024))
        assert piece
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()


def chunks_digest(client: Wire) -> str:
    digest = hashlib.sha256()
    for piece in iter(client.chunk, b""):
        digest.update(piece)
    return digest.hexdigest()


def test_four_stalled_readers_stop_the_upstream_and_cost_no_memory(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """200 MB each: the upstream gets rid of what the kernel's buffers hold and no more, until one reads again."""
    wires: list[Wire] = []

    def script(wire: Wire) -> None:
        wires.append(wire)
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % LENGTH)
        wire.pour(BLOCK, LENGTH // len(BLOCK))

    with upstream.playing(script):
        before = scripted_proxy.rss()
        clients = stalled(scripted_proxy, CHAT)
        stopped = settled(lambda: sum(wire.sent for wire in wires))
        growth = scripted_proxy.rss() - before
        print(f"four stalled readers: upstream stopped at {stopped / MiB:.1f} MiB, growth {growth / MiB:.1f} MiB")
        assert len(wires) == READERS
        assert stopped < READERS * 40 * MiB
        assert growth < 40 * MiB
        assert read_digest(clients[0], LENGTH) == hashlib.sha256(BLOCK * (LENGTH // len(BLOCK))).hexdigest()
        assert sum(wire.sent == LENGTH for wire in wires) == 1
        assert scripted_proxy.rss() - before < 40 * MiB
        for client in clients:
            client.close()


@pytest.mark.parametrize("framing", [b"0", b"1", b"close"])
def test_a_stalled_answer_of_the_simulator_goes_on_where_it_stopped(proxy: Twistd, framing: bytes) -> None:
    length = LENGTH // 4
    wanted = b"X-Vllmsim: bytes; length=%d; chunked=%s" % (length, framing)
    before = proxy.rss()
    clients = stalled(proxy, request(b"GET", b"/vllm/v1/models", wanted))
    settled(proxy.rss)
    assert proxy.rss() - before < 40 * MiB
    period = bytes(range(251))
    expected = hashlib.sha256((period * (length // 251 + 1))[:length]).hexdigest()
    got = read_digest(clients[0], length) if framing == b"0" else chunks_digest(clients[0])
    assert got == expected
    for client in clients:
        client.close()


def test_a_slow_reader_gets_all_bytes_through_many_stops(upstream: Upstream, scripted_proxy: Twistd) -> None:
    blocks = 300

    def script(wire: Wire) -> None:
        wire.message()
        wire.send(CHUNKED)
        for _ in range(blocks):
            wire.send(chunk(BLOCK))
        wire.send(LAST_CHUNK)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(CHAT)
        assert client.head().status == 200
        digest = hashlib.sha256()
        for number, piece in enumerate(iter(client.chunk, b"")):
            digest.update(piece)
            if number % 40 == 0:
                time.sleep(0.02)
        assert digest.hexdigest() == hashlib.sha256(BLOCK * blocks).hexdigest()
