"""What do clients cost that ask for 4 MiB and read nothing?

    python benchmarks/stalled_readers.py --readers 1000

Printed is by how much the proxy's memory has grown for each when nothing moves any more, and what is left of that when
they are gone. That may be most of it, since malloc keeps it; a second round must not add to it.
"""

import argparse
import asyncio
import socket

from _running import HOST, SMALL, allow_many_files, ask, descriptors_of, mib, proxy_before_upstream, rss_of

REQUEST = b"GET /vllm/v1/models HTTP/1.1\r\nHost: proxy\r\n\r\n"


async def steady(pid: int) -> int:
    """Wait until the memory of a process has not grown for 3 s, and return it."""
    last, quiet = rss_of(pid), 0
    while quiet < 3:
        await asyncio.sleep(1)
        now = rss_of(pid)
        quiet = quiet + 1 if now <= last else 0
        last = now
    return last


async def run(count: int, rounds: int) -> None:
    """Connect them and measure, as often as asked to."""
    with proxy_before_upstream("--write-timeout", "600") as (proxy, port):
        await ask(port, SMALL)
        before = rss_of(proxy.pid)
        for _ in range(rounds):
            readers = []
            for _ in range(count):
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.connect((HOST, port))
                sock.sendall(REQUEST)
                readers.append(sock)
                await asyncio.sleep(0.001)
            stalled = await steady(proxy.pid)
            each = (stalled - before) / count / 1024
            status = await ask(port, SMALL)
            print(f"{count} stalled readers: {mib(stalled)} (from {mib(before)}), {each:.1f} KiB each")
            print(f"    descriptors {descriptors_of(proxy.pid)}; a new request meanwhile: {status}")
            for sock in readers:
                sock.close()
            await asyncio.sleep(3)
            print(f"    3 s after they are gone: {mib(rss_of(proxy.pid))}, descriptors {descriptors_of(proxy.pid)}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    allow_many_files()
    asyncio.run(run(options.readers, options.rounds))


if __name__ == "__main__":
    main()
