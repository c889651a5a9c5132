"""The upstream of ``compare.py``: answers as vLLM does, with as little work as Python allows.

    python benchmarks/_canned.py PORT

The request's model says what:

``small``
    a chat completion of a few words.
``stream-MS-COUNT``
    so many events, one each MS milliseconds, each with the moment of its sending (``time.monotonic_ns()``) as its
    content; with 0 without pause, each by a ``write`` of its own, as uvicorn does it. Who asks for the usage gets it
    after the last.
``idle``
    the head and one event, then nothing until the client leaves.
``download-MB``
    so many million bytes.

A body of a million bytes or more is read and thrown away, and answered as ``small`` is.
"""

import asyncio
import gc
import os
import sys
import time
from typing import Any

import uvloop
from _running import HOST, allow_many_files

SMALL = (
    b'{"id":"chatcmpl-8f0c3a1b2d4e4f6a","object":"chat.completion","created":1790000000,"model":"small","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello! How can I help you today?","refusal":null,"annotations":null,'
    b'"audio":null,"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop",'
    b'"stop_reason":null,"token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":11,'
    b'"total_tokens":20,"completion_tokens":9,"prompt_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,'
    b'"kv_transfer_params":null}'
)
_HEAD = b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Oct 2026 12:00:00 GMT\r\nserver: uvicorn\r\ncontent-type: %s\r\n%s\r\n\r\n"
_SMALL = _HEAD % (b"application/json", b"content-length: %d" % len(SMALL)) + SMALL
_MODELS = b'{"object":"list","data":[{"id":"small","object":"model","created":1790000000,"owned_by":"vllm"}]}'
_ABOUT = _HEAD % (b"application/json", b"content-length: %d" % len(_MODELS)) + _MODELS
_STREAM = _HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked")
_BEFORE = (
    b'data: {"id":"chatcmpl-8f0c3a1b2d4e4f6a","object":"chat.completion.chunk","created":1790000000,"model":"small",'
    b'"choices":[{"index":0,"delta":{"content":"'
)
_AFTER = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
_USAGE = (
    b'data: {"id":"chatcmpl-8f0c3a1b2d4e4f6a","object":"chat.completion.chunk","created":1790000000,"model":"small",'
    b'"choices":[],"usage":{"prompt_tokens":11,"total_tokens":111,"completion_tokens":100}}\n\n'
)
#: Bytes of a body from which on nobody looks at it.
_BIG = 1_000_000
_PIECE = b"x" * 262_144


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


#: With the place for 19 digits.
_EVENT = _chunk(_BEFORE + b"0" * 19 + _AFTER).replace(b"0" * 19, b"%019d")
_END = {False: _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"}
_END[True] = _chunk(_USAGE) + _END[False]


class Upstream(asyncio.Protocol):
    """One connection, one request at a time."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._descriptor = transport.get_extra_info("socket").fileno()
        self._data = b""
        self._to_skip = 0
        self._gone = self._paused = False
        self._pieces = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._to_skip:
            self._to_skip -= len(data)
            if self._to_skip <= 0:
                self._to_skip = 0
                self._put(_SMALL)
            return
        data = self._data = self._data + data if self._data else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        size = _length(data, end)
        if size is None:  # in chunks
            if not data.endswith(b"0\r\n\r\n"):
                return
        elif len(data) < end + 4 + size:
            if size >= _BIG:
                self._data, self._to_skip = b"", size - (len(data) - end - 4)
            return
        self._data = b""
        self._answer(data)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self._put(_ABOUT)
            return
        model = request.find(b'"model"')
        begin = request.find(b'"', model + 7) + 1
        kind = request[begin : request.find(b'"', begin)]
        if kind == b"small":
            self._put(_SMALL)
        elif kind.startswith(b"stream-"):
            interval, count = map(int, kind[7:].split(b"-"))
            self._end = _END[b"include_usage" in request]
            self._put(_STREAM)
            if interval:
                self._left, self._interval = count, interval / 1000
                self._due = asyncio.get_running_loop().time()
                self._tick()
            else:
                self._burst(count)
        elif kind == b"idle":
            self._put(_STREAM)
            self._put(_EVENT % time.monotonic_ns())
        else:
            self._pieces = int(kind.removeprefix(b"download-")) * 1_000_000
            self._put(_HEAD % (b"application/octet-stream", b"content-length: %d" % self._pieces))
            self._fill()

    def _tick(self) -> None:
        self._put(_EVENT % time.monotonic_ns())
        self._left -= 1
        if self._left:
            self._due += self._interval
            self._timer = asyncio.get_running_loop().call_at(self._due, self._tick)
        else:
            self._put(self._end)

    def _burst(self, count: int) -> None:
        event = _EVENT % 0
        for _ in range(count):
            self._put(event)
        self._put(self._end)

    def _put(self, data: bytes) -> None:
        """Write at once what the socket takes; the transport would do so at the end of the loop's turn."""
        if self._gone:
            return
        if not self._transport.get_write_buffer_size():
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # the transport will say so
        if data:
            self._transport.write(data)

    def _fill(self) -> None:
        while self._pieces and not self._paused and not self._gone:
            piece = _PIECE[: self._pieces]
            self._pieces -= len(piece)
            self._transport.write(piece)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._fill()


def _length(data: bytes, end: int) -> int | None:
    """Return the length of the body, ``None`` when it comes in chunks. ``end``: of the head."""
    for name in (b"ontent-length: ", b"ontent-Length: "):
        at = data.find(name, 0, end)
        if at >= 0:
            return int(data[at + 15 : data.find(b"\r", at)])
    return None if b"chunked" in data[:end] else 0


async def main(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Upstream, HOST, port, backlog=4096)
    gc.freeze()
    gc.disable()
    await server.serve_forever()


if __name__ == "__main__":
    allow_many_files()
    uvloop.run(main(int(sys.argv[1])))
