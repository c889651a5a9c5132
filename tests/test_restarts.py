"""Restarts on one listening socket, as systemd hands it over, under load: nobody is refused, no stream is cut."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from _asking import until
from _raw import LAST_CHUNK, PATIENCE, Wire, request
from _service import MASTER_KEY, START_SECONDS, Twistd

#: What systemd does for a socket unit: the socket as descriptor 3, and who it is for (sd_listen_fds(3)).
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http")
os.execv(sys.argv[2], sys.argv[2:])
"""
#: A stream of six seconds: it outlives the restart of the process that serves it.
SIZE = 30
STREAM = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=%d; chunk=1; delay=0.2; chunked=1" % SIZE)
MODELS = request(b"GET", b"/vllm/v1/models", b"Connection: close")


class Host:
    """Holds the listening socket, and starts processes on it."""

    def __init__(self, directory: Path, upstream: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self.generations: list[Twistd] = []
        self._directory = directory
        self._upstream = upstream

    def start(self) -> Twistd:
        """Start a process and return when it says that it is ready."""
        directory = self._directory / f"generation{len(self.generations)}"
        directory.mkdir()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
            open(directory / "out", "wb") as out,
            open(directory / "err", "wb") as err,
        ):
            manager.bind(str(directory / "notify"))
            manager.settimeout(START_SECONDS)
            twistd = [sys.executable, str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile="]
            options = ["--upstream", self._upstream, "--listen", "systemd:domain=INET:name=http"]
            options += ["--access-log", "access.jsonl", "--drain-timeout", "120"]
            process = subprocess.Popen(
                [sys.executable, "-c", ACTIVATE, str(self.listener.fileno()), *twistd, "vllmproxy", *options],
                cwd=directory,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self._directory),  # they share their store
                    "VLLMPROXY_MASTER_KEY": MASTER_KEY,
                    "NOTIFY_SOCKET": str(directory / "notify"),
                },
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(self.listener.fileno(),),
            )
            service = Twistd(process, self.port, directory)
            self.generations.append(service)
            assert manager.recv(100) == b"READY=1", service.log
        return service

    def close(self) -> None:
        self.listener.close()
        for service in self.generations:
            service.stop(signal.SIGKILL)


@pytest.fixture
def host(tmp_path: Path, sim: Twistd) -> Iterator[Host]:
    made = Host(tmp_path, sim.url)
    yield made
    made.close()


class Load:
    """Streams that are always under way, and short requests, each on a connection of its own.

    :ivar whole: streams that came whole; ``answered``: short requests that were.
    :ivar failures: what became of the others.
    """

    def __init__(self, port: int, streams: int) -> None:
        self.whole = self.answered = 0
        self.failures: list[str] = []
        self._port = port
        self._streams = streams
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block; the streams that are under way then are waited for."""
        threads = [threading.Thread(target=self._stream), *(threading.Thread(target=self._ask) for _ in range(3))]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _connect(self, data: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        sock.sendall(data)
        return sock

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                with Wire(self._connect(MODELS)) as wire:
                    status = wire.message().status
                    if status == 200:
                        self.answered += 1
                    else:
                        self.failures.append(f"answered {status}")
            except Exception as error:  # a thread's failure is the test's
                self.failures.append(f"asking: {error!r}")
            time.sleep(0.01)

    def _stream(self) -> None:
        """Keep that many streams under way, and read them as they come."""
        received: dict[socket.socket, bytes] = {}
        poll = select.poll()
        by_fd: dict[int, socket.socket] = {}
        while by_fd or not self._stop.is_set():
            while len(by_fd) < self._streams and not self._stop.is_set():
                try:
                    sock = self._connect(STREAM)
                except OSError as error:
                    self.failures.append(f"streaming: {error!r}")
                    return
                by_fd[sock.fileno()] = sock
                received[sock] = b""
                poll.register(sock, select.POLLIN)
            for fd, _ in poll.poll(1000):
                sock, data = by_fd[fd], b""
                with suppress(ConnectionResetError):
                    data = sock.recv(65_536)
                received[sock] += data
                if not data or received[sock].endswith(LAST_CHUNK):
                    self._judge(received.pop(sock))
                    poll.unregister(by_fd.pop(fd))
                    sock.close()

    def _judge(self, answer: bytes) -> None:
        if answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"1\r\n") >= SIZE and answer.endswith(LAST_CHUNK):
            self.whole += 1
        else:
            self.failures.append(f"stream: {answer[-100:]!r}")


def restart(host: Host, restarts: int, streams: int) -> None:
    running = host.start()
    load = Load(host.port, streams)
    with load.running():
        for _ in range(restarts):
            former, running = running, host.start()
            former.process.send_signal(signal.SIGTERM)
            log = running.directory / "access.jsonl"
            until(lambda log=log: log.stat().st_size or load.failures)  # type: ignore[misc]
    running.process.send_signal(signal.SIGTERM)
    for service in host.generations:
        assert service.process.wait(START_SECONDS) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert "Traceback" not in service.log
        assert "Unhandled" not in service.log
        assert {record["ended"] for record in service.access_records} == {"done"}
    assert not load.failures
    assert load.whole >= streams
    records = sum(len(service.access_records) for service in host.generations)
    assert records == load.whole + load.answered


def test_restarts_under_load(host: Host) -> None:
    restart(host, restarts=5, streams=20)


@pytest.mark.long
def test_many_restarts_under_load(host: Host) -> None:
    restart(host, restarts=50, streams=200)
