"""Real ``twistd`` processes for tests: the proxy and the simulated vLLM, each on a free port of loopback."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _ports import free_port
from attrs import define

#: Generous: a loaded machine starts a Python process in seconds.
START_SECONDS = 60.0
MASTER_KEY = "sk-master-for-tests-0123456789"

#: Starts one, with options; a fixture that stops it at the end.
Start = Callable[..., "Twistd"]


@define
class Twistd:
    """A running ``twistd`` process."""

    process: subprocess.Popen[bytes]
    port: int
    directory: Path

    @property
    def url(self) -> str:
        """``http://127.0.0.1:port``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it printed so far, both streams."""
        return (self.directory / "out").read_text() + (self.directory / "err").read_text()

    @property
    def access_records(self) -> list[dict[str, object]]:
        """The access log's records so far (``--access-log access.jsonl``)."""
        return [json.loads(line) for line in (self.directory / "access.jsonl").read_text().splitlines()]

    def rss(self) -> int:
        """Resident memory in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def connect(self) -> socket.socket:
        """Return a connected socket with a generous time limit."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def refuses(self) -> bool:
        """Whether nobody listens any more."""
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass  # it was in the queue of the listener when that was closed
        return False

    def get_json(self, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> object:
        """Ask for ``path`` and return the decoded answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, headers=headers or {})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """End it and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
            try:
                self.process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        status: int = self.process.returncode
        return status


def start(directory: Path, command: str, *arguments: str, port: int, env: dict[str, str] | None = None) -> Twistd:
    """Start ``twistd --nodaemon <command> <arguments>`` in ``directory`` and wait until ``port`` accepts."""
    process = run(directory, command, *arguments, env=env)
    service = Twistd(process, port, directory)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"{command} ended with {process.returncode}:\n{service.log}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return service
    service.stop(signal.SIGKILL)
    raise AssertionError(f"{command} does not listen on {port}:\n{service.log}")


def run(directory: Path, command: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``twistd --nodaemon <command> <arguments>`` without waiting for anything."""
    directory.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not _configures(name)}
    clean.update({"HOME": str(directory), "XDG_STATE_HOME": str(directory / "state")}, **(env or {}))
    twistd = str(Path(sys.executable).with_name("twistd"))
    with open(directory / "out", "wb") as out, open(directory / "err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, twistd, "--nodaemon", "--pidfile=", command, *arguments],
            cwd=directory,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def _configures(name: str) -> bool:
    """Whether an environment variable would change the proxy's settings."""
    prefixes = ("VLLM", "HOSTED_VLLM", "LITELLM", "REDIS_URL", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "XDG_STATE")
    return name.startswith(prefixes)


def start_simulator(directory: Path, *arguments: str) -> Twistd:
    """Start ``twistd vllmsim``."""
    port = free_port()
    return start(directory, "vllmsim", "--listen", f"tcp:{port}:interface=127.0.0.1", *arguments, port=port)


def start_proxy(directory: Path, upstream: str, *arguments: str, env: dict[str, str] | None = None) -> Twistd:
    """Start ``twistd vllmproxy`` in front of ``upstream`` with :data:`MASTER_KEY` and an access log in a file."""
    port = free_port()
    listen = f"tcp:{port}:interface=127.0.0.1"
    options = ("--upstream", upstream, "--listen", listen, "--access-log", "access.jsonl", *arguments)
    return start(directory, "vllmproxy", *options, port=port, env={"VLLMPROXY_MASTER_KEY": MASTER_KEY, **(env or {})})
