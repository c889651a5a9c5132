"""The ``vllmproxy`` command as a process, in a terminal or not, and a server that answers it what a test says."""

import fcntl
import json
import os
import pty
import re
import select
import ssl
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from _service import MASTER_KEY
from attrs import define, field, frozen

SECONDS = 60.0


@frozen
class Ended:
    """What a command did."""

    status: int
    out: str
    err: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def failure(self) -> str:
        """The sentence that it failed with, and that has to be all it said."""
        assert (self.status, self.out) == (1, "")
        (line,) = self.err.splitlines()
        return line.removeprefix("vllmproxy: ")


def environment(url: str | None, key: str | None = MASTER_KEY, **more: str) -> dict[str, str]:
    """What the command finds around it: nothing of whoever runs the tests, ``url`` and ``key``."""
    names = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    found = {name: os.environ[name] for name in names if name in os.environ}
    said = {"VLLMPROXY_URL": url, "VLLMPROXY_MASTER_KEY": key}
    return found | {name: value for name, value in said.items() if value is not None} | more


def command(*arguments: str) -> list[str]:
    """The command line of ``vllmproxy`` with ``arguments``."""
    return [sys.executable, "-m", "vllmproxy", *arguments]


def vllmproxy(
    *arguments: str, url: str | None = None, key: str | None = MASTER_KEY, stdin: str = "", **more: str
) -> Ended:
    """Run it to its end, with pipes all round."""
    done = subprocess.run(
        command(*arguments),
        env=environment(url, key, **more),
        input=stdin.encode(),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def in_terminal(*arguments: str, url: str, columns: int, prompt: str = "", typed: str = "", **more: str) -> Ended:
    """Run it in a terminal that wide; what it says on both streams is in ``out``, without carriage returns.

    :param typed: what a person types when ``prompt`` is there.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        command(*arguments),
        env=environment(url, TERM="xterm", **more),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    shown = b""
    try:
        for data in _all_of(ours):
            shown += data
            if typed and shown.endswith(prompt.encode()):
                os.write(ours, typed.encode())
                typed = ""
        process.wait(SECONDS)
    finally:
        os.close(ours)
        process.kill()
        process.wait()
    assert b"Traceback" not in shown, shown
    return Ended(process.returncode, shown.decode().replace("\r\n", "\n"))


def _all_of(descriptor: int) -> Iterator[bytes]:
    while True:
        readable, _, _ = select.select([descriptor], [], [], SECONDS)
        assert readable, "the command neither says anything nor ends"
        try:
            data = os.read(descriptor, 65_536)
        except OSError:  # EIO: the other side of a terminal is closed
            return
        if not data:
            return
        yield data


def without_styles(text: str) -> str:
    """``text`` without the sequences that make it bold or coloured, the only ones a table may have."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


_AS_IN_A_TERMINAL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vllmproxy.__main__ import main
sys.exit(main())
"""


@contextmanager
def running(*arguments: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start it, with Ctrl-C not ignored, however the tests were started, and end it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_IN_A_TERMINAL, *arguments],
        env=environment(url),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@frozen
class Asked:
    """A request as the server got it."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    target: str


@frozen
class Said:
    """What the server answers; a ``body`` that is not ``bytes`` is sent as JSON."""

    body: Any
    status: int = 200
    content_type: str = "application/json"


@define
class FakeServer:
    """A server of the test's own; each request is answered with what ``answer`` returns for it."""

    answer: Callable[[Asked], Said]
    asked: list[Asked] = field(factory=list)
    url: str = ""


@contextmanager
def fake_server(answer: Callable[[Asked], Said], tls: ssl.SSLContext | None = None) -> Iterator[FakeServer]:
    """Run a server on loopback."""
    fake = FakeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            split = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(split.query).items()}
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = json.loads(content) if content else None
            fake.asked.append(Asked(self.command, split.path, query, body, headers, self.path))
            said = fake.answer(fake.asked[-1])
            data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            self.send_response(said.status)
            self.send_header("content-type", said.content_type)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, format: str, *values: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: clients that do not trust the certificate leave."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    fake.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def key_file(path: Path, text: str = MASTER_KEY) -> str:
    """Write a key's file and return its name."""
    path.write_text(text + "\n")
    return str(path)
