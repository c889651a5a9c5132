"""How soon does vLLM see that a client is gone, with hundreds of streams under way?

    python benchmarks/client_aborts.py --streams 500

The streams are of five sorts, as many of each: clients that read events and then reset, half-close (FIN) or close;
such as never read anything, and reset; and such as stop reading a large answer, and reset when everything before them
is full. They leave one after the other while the others go on, and in another round all in the same moment. Printed
is the time from leaving until the upstream's connection ends, which this process takes on both sides by one clock, and
how long the proxy computed meanwhile, or waited for a processor that had other work to do.
"""

import argparse
import asyncio
import random
import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from _running import HOST, allow_many_files, free_port, proxy_before, quantile

WAYS = ("reset", "fin", "close", "unread", "paused")
REQUEST = (
    b"POST /vllm/v1/chat/completions?stream=%d&large=%d HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    b'Content-Length: 15\r\n\r\n{"stream":true}'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"id": "x", "choices": [{"delta": {"content": "word"}}]}\n\n'
BLOCK = b"x" * 65_536


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """One connection with a stream on it: an event now and then, or as much as the other side takes.

    :ivar all: the connections, by the stream's number; ``ended``: when each was seen to end.
    """

    all: dict[int, "Upstream"] = {}
    ended: dict[int, float] = {}
    every = 0.25

    def __init__(self) -> None:
        self.number = -1
        self.paused = False
        self._large = self._over = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        found = re.match(rb"POST \S+stream=(\d+)&large=(\d) ", data)
        if found:
            self.number, self._large = int(found[1]), found[2] == b"1"
            self.all[self.number] = self
            self._transport.write(HEAD + chunk(EVENT))
            self._go_on()

    def _go_on(self) -> None:
        if self._over:
            return
        if not self._large:
            self._transport.write(chunk(EVENT))
            asyncio.get_running_loop().call_later(self.every, self._go_on)
        while self._large and not self.paused:
            self._transport.write(chunk(BLOCK))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._go_on()

    def eof_received(self) -> None:
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        self._over, self._large = True, False
        self.ended.setdefault(self.number, time.monotonic())


class Client:
    """A client of one stream.

    :ivar left: when it left; ``broken``: it was left by the proxy before.
    """

    def __init__(self, number: int, way: str) -> None:
        self.number = number
        self.way = way
        self.left = 0.0
        self.broken = False
        self._sock = socket.socket()
        self._reading: asyncio.Task[None] | None = None

    async def begin(self, port: int) -> None:
        """Ask, and begin to read if it reads."""
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        await loop.sock_connect(self._sock, (HOST, port))
        await loop.sock_sendall(self._sock, REQUEST % (self.number, self.way == "paused"))
        if self.way != "unread":
            assert (await loop.sock_recv(self._sock, 4096)).startswith(b"HTTP/1.1 200 ")
        if self.way not in ("unread", "paused"):
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._sock, 65_536):
                pass
        self.broken = not self.left

    def leave(self) -> None:
        """Leave; a half-closed socket stays, as its client would stay."""
        if self.way != "fin" and self._reading:
            self._reading.cancel()
            asyncio.get_running_loop().remove_reader(self._sock)
        self.left = time.monotonic()
        if self.way == "fin":
            self._sock.shutdown(socket.SHUT_WR)
            return
        if self.way != "close":
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    async def end(self) -> None:
        """Take back what is left of it."""
        if self._reading:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        self._sock.close()


async def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until it is so, or too long."""
    for _ in range(int(seconds * 10)):
        if condition():
            return
        await asyncio.sleep(0.1)


async def begin_all(count: int, port: int) -> list[Client]:
    """Start the streams, and wait until the large ones have filled everything."""
    clients = [Client(number, WAYS[number % len(WAYS)]) for number in range(count)]
    for start in range(0, count, 50):
        await asyncio.gather(*(client.begin(port) for client in clients[start : start + 50]))
    await until(lambda: len(Upstream.all) == count)
    await asyncio.sleep(3)
    full = sum(Upstream.all[client.number].paused for client in clients if client.way == "paused")
    assert full == sum(client.way == "paused" for client in clients), f"only {full} are full"
    return clients


def processor_of(pid: int) -> tuple[float, float]:
    """Return for how many milliseconds a process has computed, and waited for a processor."""
    computed, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(computed) / 1e6, int(waited) / 1e6


def report(what: str, clients: list[Client]) -> None:
    """Say how long it took, in all and by the way of leaving."""
    took: dict[str, list[float]] = defaultdict(list)
    for client in clients:
        if client.number in Upstream.ended and not client.broken:
            took[client.way].append((Upstream.ended[client.number] - client.left) * 1000)
    everything = [value for values in took.values() for value in values]
    print(f"{what}: {len(everything)} of {len(clients)} seen to end")
    for name, values in [("all", everything), *took.items()]:
        p50, p99 = quantile(values, 0.5), quantile(values, 0.99)
        print(f"    {name:7} median {p50:.1f} ms, p99 {p99:.1f} ms, max {max(values, default=0):.1f} ms")


async def run(count: int, pause: float) -> None:
    """Two rounds: one after the other, and all at once."""
    upstream = free_port()
    server = await asyncio.get_running_loop().create_server(Upstream, HOST, upstream, backlog=4096)
    with proxy_before(upstream) as (proxy, port):
        for what, between in [(f"one each {pause * 1000:g} ms", pause), ("all at once", 0.0)]:
            Upstream.all.clear()
            Upstream.ended.clear()
            clients = await begin_all(count, port)
            before = processor_of(proxy.pid)
            leaving = random.Random(0).sample(clients, count)
            for client in leaving:
                client.leave()
                if between:
                    await asyncio.sleep(between)
            await until(lambda: Upstream.ended.keys() >= Upstream.all.keys())
            computed, waited = (now - then for now, then in zip(processor_of(proxy.pid), before, strict=True))
            report(f"{count} streams, clients leave {what}", clients)
            print(f"    the proxy computed {computed:.0f} ms, and waited {waited:.0f} ms for a processor")
            await asyncio.gather(*(client.end() for client in clients))
    server.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between two that leave")
    options = parser.parse_args()
    allow_many_files()
    asyncio.run(run(options.streams, options.pause))


if __name__ == "__main__":
    main()
