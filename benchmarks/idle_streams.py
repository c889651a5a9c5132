"""What do thousands of streams that are under way and silent cost, and how long does a new request take beside them?

    python benchmarks/idle_streams.py --streams 9500

Each stream has had its head and one event. Printed are the memory that the proxy then has, and what a small POST on a
new connection takes, asked one after the other.
"""

import argparse
import asyncio
import time

from _running import HOST, SMALL, allow_many_files, ask, descriptors_of, mib, proxy_before_upstream, quantile, rss_of

_BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "hello"}]}'
STREAM = (
    b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY
)


class Stream(asyncio.Protocol):
    """A client of one stream; ``begun`` is done when its first event is here."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(STREAM)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._data += data
        if b"data: " in self._data and not self.begun.done():
            self.begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        if not self.begun.done():
            self.begun.set_exception(exc or ConnectionError(self._data[:80]))


async def run(count: int, requests: int) -> None:
    """Open the streams, measure, and see that all of them are still there."""
    loop = asyncio.get_running_loop()
    with proxy_before_upstream() as (proxy, port):
        await ask(port, SMALL)
        before = rss_of(proxy.pid)
        streams: list[Stream] = []
        while len(streams) < count:
            made = [loop.create_connection(Stream, HOST, port) for _ in range(min(200, count - len(streams)))]
            batch = [protocol for _, protocol in await asyncio.gather(*made)]
            await asyncio.gather(*(stream.begun for stream in batch))
            streams += batch
        await asyncio.sleep(3)
        after, files = rss_of(proxy.pid), descriptors_of(proxy.pid)
        took = []
        for _ in range(requests):
            began = time.monotonic()
            status = await ask(port, SMALL)
            assert status == 200, status
            took.append(time.monotonic() - began)
        ended = sum(stream.ended for stream in streams)
        print(f"{count} streams: {mib(after)} (from {mib(before)}, {(after - before) / count / 1024:.1f} KiB each)")
        print(f"    descriptors {files}; streams that ended: {ended}")
        p50, p99 = (quantile(took, share) * 1000 for share in (0.5, 0.99))
        print(f"    {requests} new requests: p50 {p50:.1f} ms, p99 {p99:.1f} ms, worst {max(took) * 1000:.1f} ms")
        for stream in streams:
            stream.transport.abort()  # type: ignore[attr-defined]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=9500)
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    allow_many_files()
    asyncio.run(run(options.streams, options.requests))


if __name__ == "__main__":
    main()
