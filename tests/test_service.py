"""Real processes that do start: where they listen, what configures them, when they begin and how they end."""

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from _asking import ask, until
from _ports import free_port
from _redis import redis_server
from _service import MASTER_KEY, START_SECONDS, Twistd, run, start, start_proxy, start_simulator

KEY = {"VLLMPROXY_MASTER_KEY": MASTER_KEY}
AUTH = {"Authorization": f"Bearer {MASTER_KEY}"}
MODELS = "/vllm/v1/models"
#: What systemd does for a socket unit: the socket as descriptor 3, and who it is for (sd_listen_fds(3)).
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def keep() -> Iterator[Callable[[Twistd], Twistd]]:
    """Stops at the end of the test what it is given."""
    kept: list[Twistd] = []

    def note(service: Twistd) -> Twistd:
        kept.append(service)
        return service

    yield note
    for service in kept:
        service.stop()
        assert "Traceback" not in service.log


Keep = Callable[[Twistd], Twistd]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


def plain_twistd(directory: Path, *command: str, env: dict[str, str] | None = None, fd: int | None = None) -> Any:
    """Start ``twistd`` as a person does, without ``--pidfile=``; ``fd`` is handed over as systemd does."""
    directory.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(Path(sys.executable).with_name("twistd")), "--nodaemon", *command]
    if fd is not None:
        words = [sys.executable, "-c", ACTIVATE, str(fd), *words]
    clean = {"PATH": os.environ["PATH"], "HOME": str(directory), **KEY, **(env or {})}
    with open(directory / "out", "wb") as out, open(directory / "err", "wb") as err:
        return subprocess.Popen(
            words,
            cwd=directory,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            pass_fds=() if fd is None else (fd,),
        )


# where it listens


def test_a_unix_socket(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    path = tmp_path / "proxy.sock"
    process = run(tmp_path, "vllmproxy", "--upstream", sim.url, "--listen", f"unix:{path}", env=KEY)
    keep(Twistd(process, 0, tmp_path))
    until(path.exists, START_SECONDS)
    connection = UnixConnection(path)
    connection.request("GET", MODELS, headers=AUTH)
    answer = connection.getresponse()
    assert (answer.status, b"qwen" in answer.read()) == (200, True)
    connection.request("GET", MODELS)
    assert connection.getresponse().status == 401
    connection.close()


def test_a_unix_socket_of_a_process_that_was_killed_is_taken_over(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    path = tmp_path / "proxy.sock"
    for _ in range(2):
        process = run(tmp_path, "vllmproxy", "--upstream", sim.url, "--listen", f"unix:{path}", env=KEY)
        service = keep(Twistd(process, 0, tmp_path))
        until(lambda service=service: "Listening on" in service.log, START_SECONDS)  # type: ignore[misc]
        connection = UnixConnection(path)
        connection.request("GET", MODELS, headers=AUTH)
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("which", ["index=0", "name=http"])
def test_a_socket_from_systemd(tmp_path: Path, sim: Twistd, keep: Keep, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        options = ("--upstream", sim.url, "--listen", f"systemd:domain=INET:{which}")
        process = plain_twistd(tmp_path, "vllmproxy", *options, fd=listener.fileno())
        service = keep(Twistd(process, port, tmp_path))
        assert ask(service, "GET", MODELS, key=MASTER_KEY).status == 200  # connected before there was a proxy
    assert ask(service, "GET", MODELS, key=MASTER_KEY).status == 200
    assert ask(service, "GET", MODELS).status == 401


def test_a_socket_from_systemd_with_a_certificate_of_ours(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    pem, trust = tmp_path / "a:b.pem", ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def issue() -> None:
        authority = trustme.CA()
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
        authority.configure_trust(trust)

    def status() -> int:
        connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=trust)
        try:
            connection.request("GET", MODELS, headers=AUTH)
            return connection.getresponse().status
        finally:
            connection.close()

    issue()
    quoted = str(pem).replace(":", "\\:")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        endpoint = f"systemd:domain=INET:name=http:privateKey={quoted}:certKey={quoted}"
        process = plain_twistd(tmp_path, "vllmproxy", "--upstream", sim.url, "--listen", endpoint, fd=listener.fileno())
        service = keep(Twistd(process, port, tmp_path))
        assert status() == 200
        assert f"Listening on https://127.0.0.1:{port}" in service.log
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        issue()
        with pytest.raises(ssl.SSLCertVerificationError):
            status()
        process.send_signal(signal.SIGHUP)
        until(lambda: "no setting changed" in service.log)
        assert status() == 200


def test_a_socket_from_systemd_that_others_reach_needs_a_master_key(tmp_path: Path, sim: Twistd) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        options = ("--upstream", sim.url, "--listen", "systemd:domain=INET:index=0")
        process = plain_twistd(tmp_path, "vllmproxy", *options, env={"VLLMPROXY_MASTER_KEY": ""}, fd=listener.fileno())
        assert process.wait(START_SECONDS) == 1
    assert "no master key" in (tmp_path / "out").read_text() + (tmp_path / "err").read_text()


def test_two_listeners(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    other = free_port()
    service = keep(start_proxy(tmp_path, sim.url, "--listen", f"tcp:{other}:interface=127.0.0.1"))
    for port in (service.port, other):
        assert ask(Twistd(service.process, port, tmp_path), "GET", MODELS, key=MASTER_KEY).status == 200


# what configures it


def test_a_toml_file(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    port, other = free_port(), free_port()
    (tmp_path / "master-key").write_text(MASTER_KEY + "\n")
    (tmp_path / "vllmproxy.toml").write_text(
        f'upstream = "{sim.url}"\n'
        f'listen = ["tcp:{port}:interface=127.0.0.1", "tcp:{other}:interface=127.0.0.1"]\n'
        'store = "memory:"\nmaster-key-file = "master-key"\naccess-log = "access.jsonl"\nopen-metrics = true\n'
    )
    service = keep(start(tmp_path, "vllmproxy", "--config", "vllmproxy.toml", port=port))
    for each in (port, other):
        assert ask(Twistd(service.process, each, tmp_path), "GET", MODELS, key=MASTER_KEY).status == 200
    until(lambda: len(service.access_records) == 2)


def test_the_seed_s_way_with_an_environment_variable(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    port = free_port()
    env = {"HOSTED_VLLM_API_BASE": sim.url, "LITELLM_MASTER_KEY": MASTER_KEY}
    env["VLLMPROXY_LISTEN"] = f"tcp:{port}:interface=127.0.0.1"
    service = keep(start(tmp_path, "vllmproxy", port=port, env=env))
    assert ask(service, "GET", "/vllm/metrics", key=MASTER_KEY).body.count(b"vllm:") > 1
    assert ask(service, "GET", "/vllm/metrics").status == 401


@pytest.mark.parametrize(("path", "is_told"), [("/v1", True), ("", False), ("/gpu1", False)])
def test_an_upstream_whose_url_ends_in_v1(tmp_path: Path, sim: Twistd, keep: Keep, path: str, is_told: bool) -> None:
    service = keep(start_proxy(tmp_path, sim.url + path))
    reply = ask(service, "GET", "/vllm/v1/models" if path == "" else "/vllm/models", key=MASTER_KEY)
    assert reply.status == (404 if path == "/gpu1" else 200)
    assert ("The upstream's URL ends in /v1" in service.log) == is_told


@pytest.mark.parametrize("how", ["environment", "file"])
def test_the_upstream_s_own_key(tmp_path: Path, keep: Keep, how: str) -> None:
    (tmp_path / "key").write_text("sk-of-vllm-itself\n")
    guarded = keep(start_simulator(tmp_path / "sim", "--api-key-file", str(tmp_path / "key")))
    env = {"VLLM_API_KEY": "sk-of-vllm-itself"} if how == "environment" else None
    options = () if how == "environment" else ("--upstream-key-file", str(tmp_path / "key"))
    service = keep(start_proxy(tmp_path / "proxy", guarded.url, *options, env=env))
    reply = ask(service, "GET", MODELS, key=MASTER_KEY, headers={"X-Vllmsim": "echo"})
    assert reply.status == 200
    sent = [value for name, value in reply.json()["headers"] if name.lower() == "authorization"]
    assert sent == ["Bearer sk-of-vllm-itself"]
    assert ask(service, "GET", MODELS, key="sk-of-vllm-itself").status == 401


# when it begins


def test_nothing_is_answered_before_the_store_is_open(tmp_path: Path, sim: Twistd, keep: Keep) -> None:
    with redis_server() as redis:
        redis.stall()
        service = keep(start_proxy(tmp_path, sim.url, "--store", redis.url))
        with service.connect() as waiting:
            waiting.sendall(b"GET /health/liveliness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            waiting.settimeout(1)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            redis.resume()
            waiting.settimeout(30)
            assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")
        assert ask(service, "GET", MODELS, key=MASTER_KEY).status == 200


# how it ends


def test_sigterm_ends_it_within_seconds_whatever_is_under_way(tmp_path: Path, sim: Twistd) -> None:
    service = start_proxy(tmp_path, sim.url, "--drain-timeout", "0.5")
    with service.connect(), service.connect() as streaming, service.connect() as half:
        half.sendall(b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n")
        streaming.sendall(
            b"GET /vllm/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n"
            b"X-Vllmsim: bytes; length=1000000; chunk=1; delay=0.1; chunked=1\r\n\r\n" % MASTER_KEY.encode()
        )
        assert streaming.recv(100).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        status = service.stop()
        assert time.monotonic() - began < 5
    assert status in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in service.log
    assert "Unhandled" not in service.log
    (record,) = service.access_records  # the request that was cut off has its line too
    assert record["route"] == "/x"
    assert record["ended"] != "done"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_starts_again_where_it_ended(tmp_path: Path, sim: Twistd, keep: Keep, end: signal.Signals) -> None:
    port = free_port()
    for _ in range(2):
        options = ("--upstream", sim.url, "--listen", f"tcp:{port}:interface=127.0.0.1")
        service = keep(Twistd(plain_twistd(tmp_path, "vllmproxy", *options), port, tmp_path))
        until(lambda service=service: "Listening on" in service.log, START_SECONDS)  # type: ignore[misc]
        assert ask(service, "GET", MODELS, key=MASTER_KEY).status == 200
        service.process.send_signal(end)
        service.process.wait(START_SECONDS)
    assert end == signal.SIGKILL or not (tmp_path / "twistd.pid").exists()
