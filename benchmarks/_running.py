"""What the benchmarks share: a proxy and an upstream in processes of their own, and a probe that asks how it is."""

import asyncio
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
HOST = "127.0.0.1"
LIVELINESS = b"GET /health/liveliness HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n"
_BODY = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'
_HEAD = (
    b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n"
)
SMALL = _HEAD % len(_BODY) + _BODY


def free_port() -> int:
    """Return a port of loopback that nobody uses just now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def rss_of(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors_of(pid: int) -> int:
    """Return how many files a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def mib(size: float) -> str:
    """Return a size as people read it."""
    return f"{size / 2**20:.1f} MiB"


def quantile(values: list[float], share: float) -> float:
    """Return the value that ``share`` of the values do not pass; 0 where there is none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


def allow_many_files() -> None:
    """Raise this process's limit of open files, and so that of those it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def process(
    *command: str, port: int, cwd: str, env: Mapping[str, str] | None = None, seconds: float = 30
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the end of the block; begins when it listens, which it has ``seconds`` for."""
    with open(Path(cwd, f"log-{port}"), "wb") as log:
        running = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OSError):
                socket.create_connection((HOST, port), timeout=1).close()
                break
            if running.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(Path(cwd, f"log-{port}").read_text())
            time.sleep(0.005)
        yield running
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def proxy_before(upstream: int, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a proxy without keys before what listens on that port; gives the proxy and its own port."""
    port = free_port()
    twistd = str(Path(sys.executable).with_name("twistd"))
    with (
        tempfile.TemporaryDirectory() as directory,
        process(
            *(twistd, "--nodaemon", "--pidfile=", "vllmproxy", "--upstream", f"http://{HOST}:{upstream}"),
            *("--listen", f"tcp:{port}:interface={HOST}", "--store", "memory:", "--state-directory", directory),
            *("--access-log", f"{directory}/access.jsonl", *options),
            port=port,
            cwd=directory,
        ) as proxy,
    ):
        yield proxy, port


@contextmanager
def proxy_before_upstream(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run ``_upstream.py`` and a proxy without keys before it; gives the proxy and its port."""
    upstream = free_port()
    with (
        tempfile.TemporaryDirectory() as directory,
        process(sys.executable, str(HERE / "_upstream.py"), str(upstream), port=upstream, cwd=directory),
        proxy_before(upstream, *options) as running,
    ):
        yield running


async def ask(port: int, data: bytes, seconds: float = 10) -> int:
    """Ask on a new connection that closes behind the answer, read all of it, and return its status."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(data)
            answer = await reader.read()
        finally:
            writer.close()
        return int(answer.split(None, 2)[1])


class Probe:
    """Asks all the time, and keeps what came of it.

    :ivar seconds: that each answered request took; ``failed``: what became of the others.
    """

    def __init__(self, port: int, every: float = 0.2) -> None:
        self._port = port
        self._every = every
        self.seconds: dict[str, list[float]] = {"liveliness": [], "POST": []}
        self.failed: list[str] = []

    async def run(self, seconds: float) -> None:
        """Ask for that long."""
        async with asyncio.TaskGroup() as group:
            for _ in range(int(seconds / self._every)):
                group.create_task(self._ask("liveliness", LIVELINESS))
                group.create_task(self._ask("POST", SMALL))
                await asyncio.sleep(self._every)

    async def _ask(self, name: str, data: bytes) -> None:
        began = time.monotonic()
        try:
            status = await ask(self._port, data)
        except (OSError, TimeoutError, IndexError) as error:
            self.failed.append(f"{name}: {error!r}")
            return
        if status == 200:
            self.seconds[name].append(time.monotonic() - began)
        else:
            self.failed.append(f"{name}: {status}")

    def report(self) -> str:
        """Say how it went, in one line."""
        parts = [
            f"{name} {len(took)} answered, p50 {quantile(took, 0.5) * 1000:.0f} ms, "
            f"p99 {quantile(took, 0.99) * 1000:.0f} ms, worst {max(took, default=0) * 1000:.0f} ms"
            for name, took in self.seconds.items()
        ]
        return "; ".join([*parts, f"{len(self.failed)} failed {dict(Counter(self.failed)) or ''}"])
