"""Do bodies arrive as they were sent, whatever their pieces?

    python benchmarks/integrity.py --gib 20

Uploads and downloads in turn, over several connections at once, half of them chunked and half with a length. Chunks
have 1 byte to 256 KiB, small ones as likely as large ones, and so have the writes, each cut for itself. A body ends
with the SHA-256 of all before it, which whoever reads it compares. Printed are the bytes, the mismatches (a body that
is short counts as one), and the seconds.
"""

import argparse
import hashlib
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httptools
from _running import HOST, free_port, process, proxy_before, rss_of
from attrs import frozen

POOL = random.Random(0).randbytes(2**22)
DIGEST = hashlib.sha256().digest_size
LARGEST = 18
UPLOAD = b"POST /vllm/v1/audio/transcriptions HTTP/1.1\r\nHost: proxy\r\n%s\r\n\r\n"
DOWNLOAD = b"GET /vllm/v1/models?size=%d&chunked=%d&seed=%d HTTP/1.1\r\nHost: proxy\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n%s\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BAD = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"


class Reader:
    """Reads messages from a socket, and compares the bodies with their ends.

    :ivar good: the last body was as it said; ``size``: of it; ``tail``: its last bytes; ``url``: of a request.
    """

    def __init__(self, sock: socket.socket, parser: Callable[[Any], Any]) -> None:
        self._sock = sock
        self._parser = parser(self)
        self._done = False

    def on_message_begin(self) -> None:
        self._digest, self.tail, self.size, self.url = hashlib.sha256(), b"", 0, b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, data: bytes) -> None:
        self.size += len(data)
        data = self.tail + data
        self._digest.update(data[:-DIGEST])
        self.tail = data[-DIGEST:]

    def on_message_complete(self) -> None:
        self.good = self.tail == self._digest.digest()
        self._done = True

    def next(self) -> bool:
        """Read a message; ``False`` where there is none."""
        self._done = False
        while not self._done:
            data = self._sock.recv(2**18)
            if not data:
                return False
            self._parser.feed_data(data)
        return True


def framing(size: int, chunked: bool) -> bytes:
    """Return the header line that says how long a body is."""
    return b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size


def pieces(lot: random.Random, size: int) -> Iterator[bytes]:
    """Return a body of that size in pieces, its digest last."""
    digest, left = hashlib.sha256(), size - DIGEST
    while left:
        length = min(left, int(2 ** lot.uniform(0, LARGEST)))
        at = lot.randrange(len(POOL) - length)
        data = POOL[at : at + length]
        digest.update(data)
        left -= length
        yield data
    yield digest.digest()


def send(sock: socket.socket, lot: random.Random, size: int, chunked: bool) -> None:
    """Send a body in writes of random sizes."""
    held, write = bytearray(), 1
    for data in pieces(lot, size):
        held += b"%x\r\n%s\r\n" % (len(data), data) if chunked else data
        while len(held) >= write:
            sock.sendall(held[:write])
            del held[:write]
            write = int(2 ** lot.uniform(0, LARGEST))
    sock.sendall(bytes(held) + (b"0\r\n\r\n" if chunked else b""))


def serve(port: int) -> None:
    """Be the upstream: say of a POST whether it came well, and answer a GET with a body."""
    listener = socket.create_server((HOST, port), backlog=128)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def _serve_one(sock: socket.socket) -> None:
    reader = Reader(sock, httptools.HttpRequestParser)
    while reader.next():
        query = httptools.parse_url(reader.url).query
        if not query:
            sock.sendall(OK if reader.good else BAD)
            continue
        size, chunked, seed = (int(part.partition(b"=")[2]) for part in query.split(b"&"))
        sock.sendall(ANSWER % framing(size, bool(chunked)))
        send(sock, random.Random(seed), size, bool(chunked))
    sock.close()


@frozen
class Body:
    """One body to send, up or down; all of it follows from ``seed``."""

    size: int
    up: bool
    chunked: bool
    seed: int

    def __str__(self) -> str:
        way, how = "up" if self.up else "down", "chunked" if self.chunked else "with a length"
        return f"{self.size} bytes {way}, {how}, seed {self.seed}"


class Work:
    """What is left to do, and what was done.

    :ivar done: bytes each way; ``bodies``: how many; ``mismatches``: what was wrong with which of them.
    """

    def __init__(self, size: int, largest: int, seed: int) -> None:
        self._left = size
        self._largest = largest
        self._lot = random.Random(seed)
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.bodies = 0
        self.mismatches: list[str] = []

    def take(self) -> Body | None:
        """Return the next body."""
        with self._lock:
            if self._left <= 0:
                return None
            size = max(min(self._left, self._lot.randint(1, self._largest)), DIGEST + 1)
            self._left -= size
            self.bodies += 1
            return Body(size, self.bodies % 2 == 0, self.bodies // 2 % 2 == 0, self._lot.randrange(2**32))

    def client(self, port: int) -> None:
        """Send and ask until nothing is left."""
        while body := self.take():
            try:
                with socket.create_connection((HOST, port), timeout=60) as sock:
                    good = upload(sock, body) if body.up else download(sock, body)
                wrong = "" if good else "it did not arrive as it was sent"
            except (OSError, httptools.HttpParserError) as error:
                wrong = repr(error)
            with self._lock:
                self.done["up" if body.up else "down"] += body.size
                if wrong:
                    self.mismatches.append(f"{body}: {wrong}")


def upload(sock: socket.socket, body: Body) -> bool:
    """Send it, and return what the upstream says of it."""
    sock.sendall(UPLOAD % framing(body.size, body.chunked))
    send(sock, random.Random(body.seed), body.size, body.chunked)
    reader = Reader(sock, httptools.HttpResponseParser)
    return reader.next() and reader.tail == b"ok"


def download(sock: socket.socket, body: Body) -> bool:
    """Ask for it, and return whether it came well."""
    sock.sendall(DOWNLOAD % (body.size, body.chunked, body.seed))
    reader = Reader(sock, httptools.HttpResponseParser)
    return reader.next() and reader.good and reader.size == body.size


def run(proxy: subprocess.Popen[bytes], port: int, work: Work, connections: int) -> None:
    """Do it, and say how it went."""
    began = time.monotonic()
    threads = [threading.Thread(target=work.client, args=(port,)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    up, down = work.done["up"], work.done["down"]
    print(f"{up + down:,} bytes ({up:,} up, {down:,} down) in {work.bodies} bodies")
    print(f"mismatches: {len(work.mismatches)} {work.mismatches[:3] or ''}")
    print(f"{took:.0f} s, {(up + down) / took / 2**20:.0f} MiB/s; the proxy then has {rss_of(proxy.pid) >> 20} MiB")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=20)
    parser.add_argument("--largest", type=float, default=64, help="MiB that a body has at most")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        serve(options.upstream)
    upstream, this = free_port(), str(Path(__file__).resolve())
    work = Work(int(options.gib * 2**30), int(options.largest * 2**20), options.seed)
    with (
        tempfile.TemporaryDirectory() as directory,
        process(sys.executable, this, "--upstream", str(upstream), port=upstream, cwd=directory),
        proxy_before(upstream) as (proxy, port),
    ):
        run(proxy, port, work, options.connections)


if __name__ == "__main__":
    main()
