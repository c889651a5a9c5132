"""Stopping a real process: who is told, who is let finish, who is cut off, and what is settled by then."""

import http.client
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import CHAT, ask, make_key, until
from _raw import AUTH, Ended, Wire, connect, request
from _service import MASTER_KEY, START_SECONDS, Twistd, start_proxy

MODELS = request(b"GET", b"/vllm/v1/models")
#: About 4 s of chunks, and about an hour of them.
SHORT = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40; chunk=1; delay=0.1; chunked=1")
LONG = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40000; chunk=1; delay=0.1; chunked=1")
TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.fixture
def services() -> Iterator[list[Twistd]]:
    """Stopped at the end of the test, if they still run."""
    started: list[Twistd] = []
    yield started
    for service in started:
        service.stop(signal.SIGKILL)
        assert "Traceback" not in service.log
        assert "Unhandled" not in service.log


def begun(service: Twistd, stream: bytes) -> Wire:
    """Ask for a stream and return when some of it has come."""
    wire = connect(service)
    wire.send(stream)
    assert wire.head().status == 200
    wire.chunk()
    return wire


def test_a_stop_in_all_its_steps(tmp_path: Path, sim: Twistd, services: list[Twistd]) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-delay", "3", "--drain-timeout", "60")
    services.append(service)
    assert ask(service, "GET", "/health/readiness").json()["status"] == "healthy"
    with connect(service) as idle, begun(service, SHORT) as stream:
        idle.send(MODELS)
        assert idle.message().status == 200
        service.process.send_signal(signal.SIGTERM)
        until(lambda: ask(service, "GET", "/health/readiness").status == 503)
        assert ask(service, "GET", "/health/readiness").json()["status"] == "stopping"
        idle.send(MODELS)  # still taken, on connections old and new
        assert idle.message().get(b"connection") == b""
        assert ask(service, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200
        until(service.refuses)
        assert idle.rest() == (b"", "fin")
        received = b"".join(iter(stream.chunk, b""))
        assert len(received) == 39
        assert stream.rest() == (b"", "fin")
        assert service.process.wait(START_SECONDS) in TERMINATED
    assert [record["ended"] for record in service.access_records if record["route"] == "/x"] == ["done"]


def test_what_is_not_done_in_time_is_cut_off_and_nothing_looks_whole(
    tmp_path: Path, sim: Twistd, services: list[Twistd]
) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "1")
    services.append(service)
    upload = request(b"POST", b"/vllm/v1/chat/completions", b"Content-Type: application/json", b"Content-Length: 9")
    manage = request(b"POST", b"/key/generate", b"Content-Type: application/json", b"Content-Length: 9")
    with (
        begun(service, LONG) as stream,
        connect(service) as half,
        connect(service) as managing,
        connect(service) as silent,
    ):
        half.send(upload)
        managing.send(manage)
        in_flight = "vllmproxy_in_flight_requests 4.0"  # the question among them
        until(lambda: in_flight in ask(service, "GET", "/metrics", key=MASTER_KEY).body.decode())
        service.process.send_signal(signal.SIGTERM)
        assert silent.rest() == (b"", "reset")
        with pytest.raises(Ended) as ended:
            b"".join(iter(stream.chunk, b""))
        assert ended.value.how == "reset"
        assert half.rest()[0] == b""
        assert service.process.wait(START_SECONDS) in TERMINATED
    records = [record for record in service.access_records if record["route"] != "/metrics"]
    assert sorted(str(record["route"]) for record in records) == ["/key/generate", "/v1/chat/completions", "/x"]
    assert {(record["ended"], record["error"]) for record in records} == {("refused", "stopping")}


@pytest.mark.parametrize("delay", ["0", "600"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, sim: Twistd, services: list[Twistd], delay: str, number: signal.Signals
) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-delay", delay, "--drain-timeout", "600")
    services.append(service)
    with begun(service, LONG) as stream:
        service.process.send_signal(number)
        until(lambda: "Stopping: " in service.log)
        stream.chunk()
        service.process.send_signal(number)
        assert service.process.wait(START_SECONDS) in (-number, 128 + number)
        assert stream.rest()[1] == "reset"
    (record,) = service.access_records
    assert record["ended"] != "done"


def test_two_signals_in_a_row(tmp_path: Path, sim: Twistd, services: list[Twistd]) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "600")
    services.append(service)
    with begun(service, LONG):
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(START_SECONDS) < 0 or service.process.returncode > 128


def test_a_tunnel_goes_on_until_its_end(tmp_path: Path, sim: Twistd, services: list[Twistd]) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "60")
    services.append(service)
    handshake = (
        b"GET /vllm/v1/realtime HTTP/1.1\r\nHost: h\r\n" + AUTH + b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with connect(service) as tunnel:
        tunnel.send(handshake)
        assert tunnel.head().status == 101
        service.process.send_signal(signal.SIGTERM)
        until(service.refuses)
        tunnel.send(b"\x89\x82\0\0\0\0hi")  # a ping, masked by nothing
        assert tunnel.exactly(4) == b"\x8a\x02hi"
        tunnel.close()
        assert service.process.wait(START_SECONDS) in TERMINATED


def test_a_request_that_was_on_its_way_is_answered(tmp_path: Path, sim: Twistd, services: list[Twistd]) -> None:
    """A client that has just been accepted cannot know that the proxy stops."""
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "60")
    services.append(service)
    with begun(service, SHORT), connect(service) as fresh:
        fresh.send(b"GET /vllm/v1/models HTTP/1.1\r\n")
        time.sleep(0.2)
        service.process.send_signal(signal.SIGTERM)
        until(service.refuses)
        fresh.send(b"Host: h\r\n" + AUTH + b"\r\n\r\n")
        answer = fresh.message()
        assert (answer.status, answer.get(b"connection")) == (200, b"close")
        assert fresh.rest() == (b"", "fin")


def test_everything_is_settled_before_the_end(tmp_path: Path, sim: Twistd, services: list[Twistd]) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "60")
    services.append(service)
    key = make_key(service)["key"]
    body = json.dumps({**CHAT, "stream": True, "max_tokens": 30, "stream_options": {"include_usage": True}}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "X-Vllmsim": "tpot=0.05"}
    connection.request("POST", "/vllm/v1/chat/completions", body, headers)
    answer = connection.getresponse()
    answer.read(1)
    service.process.send_signal(signal.SIGTERM)
    assert answer.read().endswith(b"data: [DONE]\n\n")
    assert service.process.wait(START_SECONDS) in TERMINATED
    assert not list((tmp_path / "state" / "vllmproxy" / "usage").iterdir())  # the store has it all
    heir = start_proxy(tmp_path, sim.url)
    services.append(heir)
    (row,) = ask(heir, "GET", f"/usage?group_by=key&key={key}", key=MASTER_KEY).json()["usage"]
    assert (row["requests"], row["completion_tokens"]) == (1, 30)
