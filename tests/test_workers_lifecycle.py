"""Starting, reloading and stopping a proxy of two workers: as one process does it, whichever of them is meant."""

import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from _asking import ask, until
from _ports import free_port
from _raw import Wire, connect, request
from _redis import RedisServer
from _service import MASTER_KEY, START_SECONDS, Twistd
from _workers import both_again, is_alive, one_on_each, start_workers, workers
from test_restarts import ACTIVATE

from vllmproxy.workers.parent import STUCK

MODELS = request(b"GET", b"/vllm/v1/models")
SHORT = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=10; chunk=1; delay=0.1; chunked=1")
LONG = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40000; chunk=1; delay=0.1; chunked=1")
TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
OTHER_KEY = "sk-another-master-0123456789"


@pytest.fixture
def services() -> Iterator[list[Twistd]]:
    """Stopped at the end of the test, if they still run."""
    started: list[Twistd] = []
    yield started
    for service in started:
        pids = workers(service) if is_alive(service.process.pid) else []
        service.stop(signal.SIGKILL)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda pids=pids: not any(map(is_alive, pids)), START_SECONDS)  # type: ignore[misc]
        assert "Unhandled" not in service.log


def begun(service: Twistd, stream: bytes) -> dict[int, Wire]:
    """Ask each worker for a stream, and return when some of it has come."""
    wires = one_on_each(service, connect)
    for wire in wires.values():
        wire.send(stream)
        assert wire.head().status == 200
        wire.chunk()
    return wires


def test_a_stop_lets_the_streams_of_all_end(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    service = start_workers(tmp_path, sim.url, redis, "--drain-delay", "1", "--drain-timeout", "60")
    services.append(service)
    wires, asked = begun(service, SHORT), one_on_each(service, connect)
    pids = workers(service)
    service.process.send_signal(signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # as systemd does it, to all
    for wire in asked.values():
        until(lambda wire=wire: _readiness(wire) == 503)  # type: ignore[misc]
    assert ask(service, "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200
    until(service.refuses, START_SECONDS)
    for wire in wires.values():
        assert len(b"".join(iter(wire.chunk, b""))) == 9
    assert service.process.wait(START_SECONDS) in TERMINATED
    assert not any(map(is_alive, pids))
    assert "ended" not in service.log  # none was missed
    assert [record["ended"] for record in service.access_records if record["route"] == "/x"] == ["done", "done"]
    assert not list((tmp_path / "state" / "usage").iterdir())


def _readiness(wire: Wire) -> int:
    wire.send(b"GET /health/readiness HTTP/1.1\r\nHost: h\r\n\r\n")
    return wire.message().status


def test_a_second_signal_ends_all_of_them_at_once(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    service = start_workers(tmp_path, sim.url, redis, "--drain-timeout", "600")
    services.append(service)
    wires = begun(service, LONG)
    for pid in (service.process.pid, *workers(service)):
        os.kill(pid, signal.SIGINT)  # as a terminal does it
    until(lambda: service.log.count("Stopping: what is under way") == 2, START_SECONDS)
    for wire in wires.values():
        wire.chunk()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(START_SECONDS) in (-signal.SIGINT, 128 + signal.SIGINT)
    assert [wire.rest()[1] for wire in wires.values()] == ["reset", "reset"]


def test_a_second_signal_does_not_wait_for_one_that_is_stuck(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    service = start_workers(tmp_path, sim.url, redis, "--drain-timeout", "600")
    services.append(service)
    stuck, other = workers(service)
    os.kill(stuck, signal.SIGSTOP)
    service.process.send_signal(signal.SIGTERM)
    until(lambda: not is_alive(other), START_SECONDS)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(STUCK - 10) in TERMINATED  # it would be taken for stuck after that
    assert not is_alive(stuck)


def test_a_file_in_the_working_directory_is_no_module(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('this is not the json that was meant')")
    services.append(start_workers(tmp_path, sim.url, redis))
    assert ask(services[0], "GET", "/vllm/v1/models", key=MASTER_KEY).status == 200


def test_without_their_parent_they_go(tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]) -> None:
    service = start_workers(tmp_path, sim.url, redis, "--drain-timeout", "60")
    services.append(service)
    pids, wires = workers(service), begun(service, SHORT)
    service.stop(signal.SIGKILL)
    for wire in wires.values():
        assert len(b"".join(iter(wire.chunk, b""))) == 9
    until(lambda: not any(map(is_alive, pids)), START_SECONDS)
    assert service.refuses()


def test_a_reload_is_for_all_and_for_those_to_come(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    (tmp_path / "key").write_text(MASTER_KEY)
    config = tmp_path / "vllmproxy.toml"
    config.write_text("master-key-file = 'key'\nmax-target = 9000\n")
    env = {"VLLMPROXY_MASTER_KEY": ""}
    service = start_workers(tmp_path, sim.url, redis, "--config", str(config), "--drain-timeout", "1", env=env)
    services.append(service)
    (tmp_path / "access.jsonl").rename(tmp_path / "access.jsonl.1")
    (tmp_path / "key").write_text(OTHER_KEY)
    _reload(service, "worker 1: Reloading: master-key-file changed", "worker 2: Reloading: master-key-file changed")
    assert _statuses(service) == [(401, 200)] * 2
    until(lambda: len(service.access_records) >= 4)
    config.write_text("max-target = 'many'\n")
    said = _reload(service, "the settings stay as they are", "worker 1: Reloading: no", "worker 2: Reloading: no")
    assert said.count("max-target in ") == 1
    (killed, _), *_ = one_on_each(service, connect).items()
    os.kill(killed, signal.SIGKILL)
    both_again(service, killed)
    assert _statuses(service) == [(401, 200)] * 2
    config.write_text("master-key-file = 'key'\nworkers = 3\n")
    said = _reload(service, "worker 1: Reloading: max-target", "worker 2: Reloading: max-target")
    assert "only after a restart: workers" not in said  # the command line says 2


def _reload(service: Twistd, *lines: str) -> str:
    before = len(service.log)
    service.process.send_signal(signal.SIGHUP)
    until(lambda: all(line in service.log[before:] for line in lines), START_SECONDS)
    return service.log[before:]


def _statuses(service: Twistd) -> list[tuple[int, int]]:
    """What each worker answers to the former master key, and to the other one."""
    statuses = []
    for wire in one_on_each(service, connect).values():
        with wire:
            wire.send(MODELS)
            former = wire.message().status
            wire.send(request(b"GET", b"/vllm/v1/models", key=b"Authorization: Bearer " + OTHER_KEY.encode()))
            statuses.append((former, wire.message().status))
    return statuses


@pytest.mark.slow
def test_one_that_is_stuck_is_ended_and_systemd_hears_of_nothing(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_SECONDS)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "8000000"}
        service = start_workers(tmp_path, sim.url, redis, "--drain-timeout", "1", env=env)
        services.append(service)
        assert manager.recv(100) == b"READY=1"
        stuck = workers(service)[0]
        os.kill(stuck, signal.SIGSTOP)
        until(lambda: "has not moved for" in service.log, START_SECONDS)
        os.kill(stuck, signal.SIGCONT)
        both_again(service, stuck)
        assert "ended by SIGABRT; another is started" in service.log
        assert "Fatal Python error: Aborted" in service.log  # and where it stood
        service.process.send_signal(signal.SIGHUP)
        heard = _heard(manager, b"READY=1")
        assert heard.count(b"WATCHDOG=1") >= 2  # all along
        assert b"RELOADING=1" in heard
        service.stop()
        assert b"READY=1" not in _heard(manager, b"STOPPING=1")


def _heard(manager: socket.socket, last: bytes) -> list[bytes]:
    """Return the first line of each message to systemd up to ``last``."""
    heard = [manager.recv(100).partition(b"\n")[0]]
    while heard[-1] != last:
        heard.append(manager.recv(100).partition(b"\n")[0])
    return heard


def _issue(pem: Path) -> ssl.SSLContext:
    """Write a certificate of an authority of its own, and return what trusts that."""
    authority = trustme.CA()
    pem.write_bytes(authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    return trust


def test_all_kinds_of_listeners(tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd]) -> None:
    pem = tmp_path / "server.pem"
    trust = _issue(pem)
    port, path = free_port(), tmp_path / "http.sock"
    tls = f"ssl:{port}:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    service = start_workers(tmp_path, sim.url, redis, "--listen", tls, "--listen", f"unix:{path}:mode=600")
    services.append(service)

    def answers() -> None:
        with Wire(socket.socket(socket.AF_UNIX)) as wire:
            wire.sock.connect(str(path))
            wire.send(MODELS)
            assert wire.message().status == 200
        plain = socket.create_connection(("127.0.0.1", port), timeout=30)
        with Wire(trust.wrap_socket(plain, server_hostname="localhost")) as wire:
            wire.send(MODELS)
            assert wire.message().status == 200

    answers()
    trust = _issue(pem)
    _reload(service, "worker 1: Reloading: no", "worker 2: Reloading: no")
    for _ in range(3):
        answers()
    for pid in workers(service):
        os.kill(pid, signal.SIGTERM)
        both_again(service, pid)
        answers()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert service.stop() in TERMINATED
    assert not path.exists()


@pytest.mark.parametrize("kind", [("INET", 2), ("UNIX", 1)], ids=["INET, two", "UNIX, one"])
def test_a_socket_of_systemd_s(
    tmp_path: Path, sim: Twistd, redis: RedisServer, services: list[Twistd], kind: tuple[str, int]
) -> None:
    domain, count = kind
    path = tmp_path / "http.sock"
    twistd = [sys.executable, str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile="]
    options = ["--upstream", sim.url, "--listen", f"systemd:domain={domain}:name=http", "--workers", str(count)]
    options += ["--store", redis.url, "--access-log", "access.jsonl", "--state-directory", str(tmp_path)]
    with socket.socket(getattr(socket, f"AF_{domain}")) as listener, open(tmp_path / "out", "wb") as out:
        listener.bind(str(path) if domain == "UNIX" else ("127.0.0.1", 0))
        listener.listen(1024)
        if domain == "UNIX":
            path.chmod(0o600)
        process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, str(listener.fileno()), *twistd, "vllmproxy", *options],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "VLLMPROXY_MASTER_KEY": MASTER_KEY},
            stdout=out,
            stderr=out,
            pass_fds=(listener.fileno(),),
        )
        (tmp_path / "err").touch()
        service = Twistd(process, 0, tmp_path)
        services.append(service)
        for _ in range(2):
            with Wire(socket.socket(listener.family)) as wire:
                wire.sock.settimeout(START_SECONDS)
                wire.sock.connect(listener.getsockname())
                wire.send(MODELS)
                assert wire.message().status == 200, service.log
        assert service.stop() in TERMINATED
        assert "Traceback" not in service.log
        with socket.socket(listener.family) as client:  # it listens still, as before
            client.connect(listener.getsockname())
            listener.accept()[0].close()
        assert domain == "INET" or stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.slow
def test_as_a_daemon(tmp_path: Path, sim: Twistd, redis: RedisServer) -> None:
    port = free_port()
    options = ["--upstream", sim.url, "--listen", f"tcp:{port}:interface=127.0.0.1", "--workers", "2"]
    options += ["--store", redis.url, "--access-log", "access.jsonl", "--state-directory", "state"]
    command = [str(Path(sys.executable).with_name("twistd")), "--pidfile=pid", "--logfile=log", "vllmproxy", *options]
    env = {"PATH": os.environ["PATH"], "VLLMPROXY_MASTER_KEY": MASTER_KEY}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60)
    pid, log = int((tmp_path / "pid").read_text()), tmp_path / "log"
    try:
        until(lambda: "with 2 workers" in log.read_text(), START_SECONDS)
        with Wire(socket.create_connection(("127.0.0.1", port), timeout=30)) as wire:
            wire.send(MODELS)
            assert wire.message().status == 200
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not is_alive(pid), START_SECONDS)
    assert "worker 2: Stopping: what is under way" in log.read_text()
    assert not (tmp_path / "pid").exists()
