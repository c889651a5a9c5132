"""Reused connections that turn out closed: invisible to the caller, and no POST is executed twice."""

import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from _raw import OK, PATIENCE, Ended, Upstream, Wire, connect, request
from _service import Twistd, start_proxy, start_simulator

GET = request(b"GET", b"/vllm/v1/models")
BODY = b'{"model":"qwen2.5-7b-instruct","prompt":"hi","max_tokens":1}'


_LONG = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def post(identity: str, body: bytes = BODY) -> bytes:
    """Return a POST that can be told from every other."""
    return request(b"POST", b"/vllm/v1/completions", b"X-Request-Id: " + identity.encode(), body=body)


def call(sim: Twistd, proxy: Twistd, callers: int, pauses: list[float]) -> dict[str, int]:
    """Let callers post with these pauses between; return the statuses by request id and see that the simulator
    executed each answered POST once, and none twice."""
    statuses: dict[str, int] = {}

    def caller(name: int) -> None:
        with connect(proxy) as client:
            for number, pause in enumerate(pauses):
                client.send(post(f"edge-{name}-{number}"))
                statuses[f"edge-{name}-{number}"] = client.message().status
                time.sleep(pause + 0.002 * name)

    threads = [threading.Thread(target=caller, args=(name,), daemon=True) for name in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert len(statuses) == callers * len(pauses)
    stats = sim.get_json("/vllmsim/stats")
    assert isinstance(stats, dict)
    executed = {name: times for name, times in stats["executed"].items() if name.startswith("edge-")}
    assert set(executed.values()) == {1}
    assert {name for name, status in statuses.items() if status == 200} <= set(executed)
    assert "Traceback" not in proxy.log
    print(f"{len(statuses)} POSTs: {Counter(statuses.values())}, {stats['connections_total']} connections")
    return statuses


def test_hundreds_of_posts_in_the_face_of_a_keep_alive_that_ends(tmp_path_factory: pytest.TempPathFactory) -> None:
    """uvicorn's keep-alive, 3 s instead of 5: pauses around the moment the server closes, and around the proxy's own
    limit. No caller notices."""
    sim = start_simulator(tmp_path_factory.mktemp("three"), "--keep-alive", "3")
    proxy = start_proxy(tmp_path_factory.mktemp("in-front"), sim.url)
    try:
        statuses = call(sim, proxy, 100, [2.4, 2.9, 0.0])
        assert Counter(statuses.values()) == {200: 300}
    finally:
        proxy.stop()
        sim.stop()


def test_a_keep_alive_shorter_than_the_proxys_executes_nothing_twice(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Closed in the very moment of the request, unread but acknowledged by the server's kernel: nobody can tell what
    became of it, so that is a 502, rare even when every pause aims at that moment."""
    sim = start_simulator(tmp_path_factory.mktemp("short"), "--keep-alive", "0.05", "--ttft", "0")
    proxy = start_proxy(tmp_path_factory.mktemp("before-short"), sim.url)
    try:
        statuses = call(sim, proxy, 4, [0.046 + 0.0001 * (number % 80) for number in range(100)])
        assert set(statuses.values()) <= {200, 502}
        assert Counter(statuses.values())[200] > 300
    finally:
        proxy.stop()
        sim.stop()


@contextmanager
def asleep(service: Twistd) -> Iterator[None]:
    """The process sees nothing of what happens meanwhile until the block ends."""
    service.process.send_signal(signal.SIGSTOP)
    try:
        while Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


class Edge:
    """An upstream whose first request on each connection is answered, and whose second meets an end.

    :ivar executed: POSTs read whole, by request id.
    :ivar kept: the connection whose first request was answered last.
    """

    def __init__(self) -> None:
        self.executed: Counter[bytes] = Counter()
        self.kept: Wire | None = None
        self.answered = threading.Event()

    def take(self, wire: Wire) -> None:
        """Read and count one request."""
        message = wire.message()
        if message.start.startswith(b"POST"):
            self.executed[message.get(b"x-request-id")] += 1

    def answer_once(self, wire: Wire) -> None:
        """A script: answer one request, and leave the connection to the test."""
        self.take(wire)
        self.kept = wire
        wire.send(OK)
        self.answered.set()

    def answer_all(self, wire: Wire) -> None:
        """A script: a server as it should be."""
        with suppress(Ended):
            while True:
                self.take(wire)
                wire.send(OK)


@pytest.mark.parametrize("order", ["request first", "end first"])
@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("size", [10, 200_000])
def test_an_end_that_nobody_saw_before_the_request_is_invisible(
    upstream: Upstream, scripted_proxy: Twistd, end: str, order: str, size: int
) -> None:
    """The upstream had closed before a byte of the request could reach it, so it may be sent again."""
    edge = Edge()
    posts = [post(f"unseen-{end}-{number}", b"x" * size) for number in range(25)]
    with upstream.playing(edge.answer_once), connect(scripted_proxy) as client:
        for number, sent in enumerate(posts):
            edge.answered.clear()
            client.send(GET)
            assert client.message().status == 200
            assert edge.answered.wait(PATIENCE)
            kept = edge.kept
            assert kept is not None
            with asleep(scripted_proxy):
                if order == "request first":
                    client.send(sent[:100_000])
                kept.close() if end == "fin" else kept.reset()
                if order == "end first":
                    client.send(sent[:100_000])
            client.send(sent[100_000:])
            answer = client.message()
            assert answer.status == 200, f"number {number}: {answer}"
            assert edge.answered.wait(PATIENCE)
            assert edge.kept is not None
            edge.kept.reset()
        assert len(edge.executed) == len(posts)
        assert set(edge.executed.values()) == {1}


@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"])
def test_what_is_right_behind_an_answer_is_seen_by_the_request_that_waits_for_it(
    upstream: Upstream, scripted_proxy: Twistd, behind: bytes
) -> None:
    """The answer, which fills one read, and what comes behind it, an end or bytes that nobody asked for, are here when
    the proxy looks: the next request goes elsewhere, though its body is piped and could not be sent twice."""
    edge, asked, ready, came = Edge(), threading.Event(), threading.Event(), threading.Event()
    long = 65_536 - len(_LONG % 65_000)

    def script(wire: Wire) -> None:
        edge.take(wire)
        asked.set()
        assert ready.wait(PATIENCE)
        wire.send(_LONG % long + b"x" * long + behind)
        if not behind:
            wire.close()
        came.set()

    posts = post("before-it"), post("behind-it", b"x" * 200_000)
    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(posts[0] + posts[1][:10_000])
        assert asked.wait(PATIENCE)
        with asleep(scripted_proxy):
            ready.set()
            assert came.wait(PATIENCE)
        client.send(posts[1][10_000:])
        answers = [client.message() for _ in posts]
    assert [(answer.status, len(answer.body)) for answer in answers] == [(200, long)] * 2
    assert dict(edge.executed) == {b"before-it": 1, b"behind-it": 1}


@pytest.mark.parametrize("before", [1, 30])
@pytest.mark.parametrize("end", ["fin", "reset"])
def test_a_request_that_was_read_before_the_end_is_not_sent_again(
    upstream: Upstream, scripted_proxy: Twistd, end: str, before: int
) -> None:
    """The upstream has the POST, and may have done its work: that is a 502, and only the caller may repeat it.

    After a few exchanges the upstream's kernel acknowledges late (delayed ACK), when a reset may be under way already.
    """
    edge = Edge()

    def script(wire: Wire) -> None:
        for _ in range(before):
            edge.take(wire)
            wire.send(OK)
        edge.take(wire)
        wire.close() if end == "fin" else wire.reset()

    statuses: Counter[int] = Counter()
    with upstream.playing(script), connect(scripted_proxy) as client:
        for number in range(100):
            for _ in range(before):
                client.send(GET)
                assert client.message().status == 200
            client.send(post(f"read-{end}-{number}"))
            statuses[client.message().status] += 1
    assert set(edge.executed.values()) == {1}, f"executed twice: {edge.executed.most_common(3)}, {statuses}"
    assert statuses == {502: 100}


def test_a_request_read_after_a_half_close_is_not_sent_again(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """An upstream may say that it will say no more, and still read: that FIN does not prove that it took nothing.

    Its acknowledgement of the POST may come after the FIN (delayed ACK, or a longer way than loopback).
    """
    edge = Edge()

    def script(wire: Wire) -> None:
        with suppress(Ended, OSError):
            while True:
                edge.take(wire)
                edge.kept = wire
                wire.send(OK)

    with upstream.playing(script), connect(scripted_proxy) as client:
        for number in range(30):
            client.send(GET)
            assert client.message().status == 200
            assert edge.kept is not None
            with asleep(scripted_proxy):
                client.send(post(f"half-{number}"))
                edge.kept.half_close()
            assert client.message().status in (200, 502)
    twice = [name for name, times in edge.executed.items() if times > 1]
    assert not twice, f"{len(twice)} of 30 executed twice"


def test_a_request_behind_an_upload_that_nobody_read_is_not_sent_again(
    upstream: Upstream, scripted_proxy: Twistd
) -> None:
    """The upstream answered the upload all the same. When its FIN comes, the next request is behind that in our
    kernel: none of it has left, and all of it may yet, for the upstream reads on."""
    executed: Counter[bytes] = Counter()
    uploaded, asked = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        first = wire.some(1500)
        if b"upload" in first:
            assert uploaded.wait(PATIENCE)
        wire.send(OK)
        if b"upload" in first:
            assert asked.wait(PATIENCE)
            wire.half_close()
        with suppress(Ended):
            while more := wire.some(262_144):
                first = first[-100:] + more
        executed.update([b"behind"] * first.lower().count(b"id: behind"))

    for _ in range(10):
        executed.clear()
        uploaded.clear()
        asked.clear()
        with upstream.playing(script), connect(scripted_proxy) as uploading, connect(scripted_proxy) as client:
            uploading.send(post("upload", b"x" * 400_000))
            time.sleep(0.1)  # the kernel takes all of it
            uploaded.set()
            assert uploading.message().status == 200
            client.send(post("behind"))
            time.sleep(0.1)  # so does it of this one; were it not so, another connection is used, and nothing wrong
            asked.set()
            assert client.message().status in (200, 502)
            time.sleep(0.1)  # what the kernel still sends arrives
        assert executed[b"behind"] <= 1


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_a_request_whose_work_took_a_while_is_not_sent_again(
    upstream: Upstream, scripted_proxy: Twistd, end: str
) -> None:
    edge = Edge()

    def script(wire: Wire) -> None:
        edge.take(wire)
        wire.send(OK)
        edge.take(wire)
        time.sleep(0.1)
        wire.close() if end == "fin" else wire.reset()

    with upstream.playing(script), connect(scripted_proxy) as client:
        for number in range(5):
            client.send(GET)
            assert client.message().status == 200
            client.send(post(f"worked-{end}-{number}"))
            assert client.message().status == 502
    assert set(edge.executed.values()) == {1}


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_a_new_connection_that_ends_is_never_tried_again(upstream: Upstream, scripted_proxy: Twistd, end: str) -> None:
    """Only a reused connection can have been closed for its age."""

    def script(wire: Wire) -> None:
        wire.close() if end == "fin" else wire.reset()

    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(post(f"new-{end}"))
        assert client.message().status in (502, 503)  # 503: it ended before it was connected, and nothing was sent
        assert upstream.connections == 1


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_an_end_that_races_the_request_never_executes_it_twice(
    upstream: Upstream, scripted_proxy: Twistd, end: str
) -> None:
    """Nobody reads the second request; the end comes just before, just after, or while it arrives.

    Whoever's kernel took the bytes decides: sent again (200) or not (502), but a 200 was executed once and a 502 not
    at all, since this upstream reads nothing of what it closes on.
    """
    edge = Edge()
    statuses: dict[bytes, int] = {}
    with upstream.playing(edge.answer_once), connect(scripted_proxy) as client:
        for number in range(300):
            edge.answered.clear()
            client.send(GET)
            assert client.message().status == 200
            assert edge.answered.wait(PATIENCE)
            kept = edge.kept
            assert kept is not None
            identity = b"race-%s-%d" % (end.encode(), number)
            closing = threading.Thread(target=_end_after, args=(kept, end, (number % 30) * 0.00002))
            closing.start()
            client.send(post(identity.decode()))
            statuses[identity] = client.message().status
            closing.join(PATIENCE)
            if edge.kept is not None and edge.kept is not kept:
                edge.kept.reset()
    print(f"race, {end}: {Counter(statuses.values())}")
    assert set(statuses.values()) <= {200, 502}
    assert {name: 1 for name, status in statuses.items() if status == 200} == dict(edge.executed)


def _end_after(wire: Wire, end: str, seconds: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        pass
    if end == "reset":
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.sock.close()


def test_an_idle_connection_that_is_closed_in_good_time_is_not_used(upstream: Upstream, scripted_proxy: Twistd) -> None:
    edge = Edge()

    def script(wire: Wire) -> None:
        edge.answer_once(wire)
        wire.close()

    with upstream.playing(script), connect(scripted_proxy) as client:
        for number in range(100):
            client.send(post(f"closed-{number}"))
            assert client.message().status == 200
            time.sleep(0.005)
    assert len(edge.executed) == 100
    assert set(edge.executed.values()) == {1}


def test_a_good_connection_is_reused(upstream: Upstream, scripted_proxy: Twistd) -> None:
    edge = Edge()
    with upstream.playing(edge.answer_all), connect(scripted_proxy) as client:
        for number in range(50):
            client.send(post(f"good-{number}", os.urandom(10)))
            assert client.message().status == 200
        assert upstream.connections == 1
