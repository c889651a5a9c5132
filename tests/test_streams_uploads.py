"""Uploads that stream: bounded memory, nothing on disk, a slow upstream stops the client, Expect: 100-continue."""

import hashlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from _asking import make_key, until
from _raw import (
    OK,
    PATIENCE,
    Ended,
    MiB,
    Upstream,
    Wire,
    chunk,
    connect,
    each_request,
    open_files,
    request,
    settled,
    written,
)
from _service import Twistd, start_proxy

BLOCK = bytes(range(256)) * 1024  # 256 KiB
ECHO = b"X-Vllmsim: echo"
PATH = b"/vllm/v1/audio/transcriptions"


def upload(proxy: Twistd, blocks: int, chunked: bool) -> None:
    """Upload to the simulator's echo and compare; watch the proxy's memory and what it writes."""
    with connect(proxy) as client:  # it accepts when its store is open: what that opens and writes is no upload's
        client.send(request(b"POST", PATH, ECHO, b"Content-Length: 1") + b"x")
        assert client.message().status == 200
    files, wrote, before, peak = open_files(proxy), written(proxy), proxy.rss(), 0
    digest = hashlib.sha256()
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (blocks * len(BLOCK))
    piece = chunk(BLOCK) if chunked else BLOCK
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, ECHO, framing, b"Content-Type: application/octet-stream"))
        for number in range(blocks):
            client.send(piece)
            digest.update(BLOCK)
            if number % 64 == 0:
                peak = max(peak, proxy.rss())
                assert open_files(proxy) <= files
        client.send(b"0\r\n\r\n" if chunked else b"")
        answer = client.message()
    peak = max(peak, proxy.rss())
    print(f"{blocks * len(BLOCK) / MiB:.0f} MiB up, growth {(peak - before) / MiB:.1f} MiB")
    assert answer.status == 200
    seen = json.loads(answer.body)
    assert seen["body_length"] == blocks * len(BLOCK)
    assert seen["body_sha256"] == digest.hexdigest()
    assert peak - before < 20 * MiB
    assert written(proxy) - wrote < 64 * 1024


@pytest.mark.parametrize("chunked", [False, True])
def test_32_mb_pass_in_bounded_memory_and_touch_no_disk(proxy: Twistd, chunked: bool) -> None:
    upload(proxy, 128, chunked)


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
def test_1_gb_passes_in_bounded_memory_and_touches_no_disk(proxy: Twistd, chunked: bool) -> None:
    upload(proxy, 4096, chunked)


def test_an_upstream_that_does_not_read_stops_the_client(upstream: Upstream, scripted_proxy: Twistd) -> None:
    go_on = threading.Event()
    blocks = 400  # 100 MiB
    seen: list[str] = []

    def script(wire: Wire) -> None:
        wire.head()
        assert go_on.wait(PATIENCE)
        seen.append(hashlib.sha256(wire.exactly(blocks * len(BLOCK))).hexdigest())
        wire.send(OK)

    with upstream.playing(script), connect(scripted_proxy) as client:
        before = scripted_proxy.rss()
        client.send(request(b"POST", PATH, b"Content-Length: %d" % (blocks * len(BLOCK))))
        uploading = threading.Thread(target=client.pour, args=(BLOCK, blocks), daemon=True)
        uploading.start()
        stopped = settled(lambda: client.sent)
        assert stopped < 40 * MiB
        assert scripted_proxy.rss() - before < 20 * MiB
        go_on.set()
        uploading.join(PATIENCE)
        assert client.message().body == b"ok"
        assert seen == [hashlib.sha256(BLOCK * blocks).hexdigest()]
        assert scripted_proxy.rss() - before < 20 * MiB


def test_a_body_that_is_read_is_held_once_and_given_back(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """An alias and what asks for usage change it in two places, and it is not copied for that."""
    made = make_key(scripted_proxy, tpm_limit=10**9, aliases={"fast": "slow"})
    picture = b'"data:image/png;base64,' + b"iVBO" * (7 * MiB) + b'"'
    had: list[bytes] = []
    held: list[int] = []

    def script(wire: Wire) -> None:
        for _ in range(2):
            size = int(wire.head().get(b"content-length"))
            held.append(scripted_proxy.rss())
            had.append(wire.exactly(size))
            wire.send(OK)

    def ask(content: bytes) -> bytes:
        body = b'{"messages":[{"content":%b}],"model":"fast","stream":true}' % content
        key = b"Authorization: Bearer " + made["key"].encode()
        client.send(request(b"POST", b"/vllm/v1/chat/completions", body=body, key=key))
        assert client.message().body == b"ok"
        return body

    with upstream.playing(script), connect(scripted_proxy) as client:
        ask(b'"hi"')
        before = scripted_proxy.rss()
        body = ask(picture)
        assert scripted_proxy.rss() - before < 4 * MiB
    changed = body.replace(b'"fast"', b'"slow"')
    assert had[1] == b'{"stream_options":{"include_usage":true},' + changed[1:]
    assert len(body) / 2 < held[1] - before < 1.25 * len(body)


def test_an_upload_reaches_the_upstream_piece_by_piece(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """Each piece is sent only when the upstream has had the one before it."""
    pieces = [b"a", b"bc" * 50, b"d" * 70000, b"e"]
    got = threading.Semaphore(0)

    def script(wire: Wire) -> None:
        wire.head()
        for piece in pieces:
            received = b""
            while len(received) < len(piece):
                received += wire.chunk()
            assert received == piece
            got.release()
        assert wire.chunk() == b""
        wire.send(OK)

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(request(b"POST", PATH, b"Transfer-Encoding: chunked"))
        for piece in pieces:
            client.send(chunk(piece))
            assert got.acquire(timeout=PATIENCE)
        client.send(b"0\r\n\r\n")
        assert client.message().body == b"ok"


def test_an_answer_before_the_upload_is_over_reaches_the_client(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """vLLM's 413 or 400 in the middle of an upload is the caller's answer, not a 502 and not a reset."""
    refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig"

    def script(wire: Wire) -> None:
        wire.head()
        wire.send(refusal)
        wire.half_close()
        while wire.some():
            pass

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(request(b"POST", PATH, b"Content-Length: %d" % (8 * len(BLOCK))) + BLOCK)
        answer = client.message()
        assert (answer.status, answer.body) == (413, b"big")


def test_an_upload_that_grows_too_large_is_refused_and_never_whole_at_the_upstream(
    upstream: Upstream, tmp_path: Path
) -> None:
    ends: list[str] = []

    def script(wire: Wire) -> None:
        wire.head()
        ends.append(wire.rest()[1])

    proxy = start_proxy(tmp_path, upstream.url, f"--max-body={2 * len(BLOCK)}")
    try:
        with upstream.playing(script), connect(proxy) as client:
            client.send(request(b"POST", PATH, b"Transfer-Encoding: chunked") + chunk(BLOCK) * 2)
            client.send(chunk(b"more"))
            answer = client.message()
            assert answer.status == 413
            assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
            until(lambda: ends == ["reset"])
        with upstream.playing(script), connect(proxy) as client:
            client.send(request(b"POST", PATH, b"Content-Length: %d" % (2 * len(BLOCK) + 1)))
            assert client.message().status == 413
            assert upstream.connections == 0
    finally:
        proxy.stop()


def test_continue_is_said_to_a_good_key_and_the_answer_follows(proxy: Twistd) -> None:
    body = b'{"input": "x"}'
    head = request(b"POST", PATH, ECHO, b"Expect: 100-continue", b"Content-Length: %d" % len(body))
    with connect(proxy) as client:
        for _ in range(2):  # the connection is as good as before
            client.send(head)
            assert client.head().head == b"HTTP/1.1 100 Continue"
            client.send(body)
            answer = client.message()
            assert answer.status == 200
            assert json.loads(answer.body)["body_sha256"] == hashlib.sha256(body).hexdigest()


def test_continue_is_said_before_a_chunked_body(proxy: Twistd) -> None:
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, ECHO, b"Expect: 100-continue", b"Transfer-Encoding: chunked"))
        assert client.head().status == 100
        client.send(chunk(BLOCK) + b"0\r\n\r\n")
        assert json.loads(client.message().body)["body_length"] == len(BLOCK)


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_body_that_does_not_wait_for_the_continue_is_taken(proxy: Twistd, size: int) -> None:
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, ECHO, b"Expect: 100-continue", body=b"x" * size))
        answer = client.message()
        if answer.status == 100:
            answer = client.message()
        assert answer.status == 200
        assert json.loads(answer.body)["body_length"] == size


def test_a_bad_key_gets_its_401_instead_of_the_continue(proxy: Twistd) -> None:
    bad = b"Authorization: Bearer sk-nobody-knows-this-one"
    expect = (b"Expect: 100-continue", b"Content-Length: 1000000000")
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, *expect, key=bad))
        answer = client.message()
        assert answer.status == 401
        assert json.loads(answer.body)["error"]["code"] == "401"


def test_an_unauthorised_upload_is_refused_at_its_head(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """Without Expect too, and nothing of it reaches the upstream."""
    with upstream.playing(each_request()), connect(scripted_proxy) as client:
        client.send(request(b"POST", PATH, b"Content-Length: 1000000000", key=b"x-api-key: sk-wrong") + b"x" * 1000)
        assert client.message().status == 401
        assert upstream.connections == 0
        client.sock.settimeout(PATIENCE)
        with pytest.raises((Ended, ConnectionError, socket.timeout)):  # noqa: PT012  a refusal has an end
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                client.send(BLOCK)
