"""An upstream for the benchmarks: ``GET`` answers 4 MiB, ``POST`` something small, or with ``"stream"`` in its body one
event and then nothing until the client leaves.

    python benchmarks/_upstream.py PORT
"""

import asyncio
import resource
import sys
from typing import Any

import httptools

PIECE = b"x" * 65_536
PIECES = 64
SMALL = (
    b'{"id": "x", "object": "chat.completion", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
)
EVENT = b'data: {"id": "x", "choices": [{"delta": {"content": "word"}}]}\n\n'


class Upstream(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpRequestParser(self)
        self._body = b""
        self._left = 0
        self._paused = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = 0
        self._parser = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"GET":
            self._head(b"application/octet-stream", b"content-length: %d" % (len(PIECE) * PIECES))
            self._left = PIECES
            self._fill()
        elif b'"stream"' in self._body:
            self._head(b"text/event-stream", b"transfer-encoding: chunked")
            self._transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        else:
            self._head(b"application/json", b"content-length: %d" % len(SMALL))
            self._transport.write(SMALL)

    def _head(self, kind: bytes, framing: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n%s\r\n\r\n" % (kind, framing))

    def _fill(self) -> None:
        while self._left and not self._paused:
            self._left -= 1
            self._transport.write(PIECE)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._fill()


async def main(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(int(sys.argv[1])))
