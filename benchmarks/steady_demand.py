"""How much of a limit of requests is admitted under steady demand, and is it ever passed?

    python benchmarks/steady_demand.py --key sk-... --limit 600 http://127.0.0.1:4001/vllm http://127.0.0.1:4002/vllm

Clients ask all proxies in turn, without pause but for a moment after each refusal, for longer than the window. Printed
are the share of the limit that was admitted in each minute after the first, and the most that any 60 s had, wherever
they began, by the clock of the clients (which adds the way of an answer to the moment of an admission).
"""

import argparse
import asyncio
import time
from collections import Counter, deque
from urllib.parse import urlsplit

WINDOW = 60.0
#: Seconds that a client waits after a refusal.
PAUSE = 0.2


async def client(urls: list[str], key: str, until: float, admitted: list[float], statuses: Counter[int]) -> None:
    """Ask until ``until``, over a connection to each proxy, and note when a request was let in, and what others got."""
    connections = []
    for url in urls:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        request = f"GET {parts.path}/v1/models HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n\r\n"
        connections.append((reader, writer, request.encode()))
    while time.time() < until:
        for reader, writer, request in connections:
            writer.write(request)
            status = await answer(reader)
            statuses[status] += 1
            if status == 200:
                admitted.append(time.time())
            else:
                await asyncio.sleep(PAUSE)


async def answer(reader: asyncio.StreamReader) -> int:
    """Read one answer and return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            await reader.readexactly(int(line.partition(b":")[2]))
    return int(head.split(None, 2)[1])


def most_in_a_window(moments: list[float]) -> int:
    """Return the most of ``moments`` that lie within ``WINDOW`` seconds, wherever those begin."""
    inside: deque[float] = deque()
    most = 0
    for moment in sorted(moments):
        inside.append(moment)
        while inside[0] <= moment - WINDOW:
            inside.popleft()
        most = max(most, len(inside))
    return most


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", help="of proxies that share a store, with /vllm")
    parser.add_argument("--key", required=True, help="with the rpm_limit that --limit says, and never used before")
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=int, default=4)
    options = parser.parse_args()
    admitted: list[float] = []
    statuses: Counter[int] = Counter()
    began = time.time()
    until = began + WINDOW * options.minutes + 1
    orders = (
        options.urls[n % len(options.urls) :] + options.urls[: n % len(options.urls)] for n in range(options.clients)
    )
    await asyncio.gather(*(client(urls, options.key, until, admitted, statuses) for urls in orders))
    first = min(admitted)
    for minute in range(options.minutes):
        count = sum(first + WINDOW * minute <= moment < first + WINDOW * (minute + 1) for moment in admitted)
        print(f"minute {minute + 1}: {count} of {options.limit}, {100 * count / options.limit:.2f} %")
    print("answers:", ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())))
    print(f"most within any {WINDOW:g} s: {most_in_a_window(admitted)}")


if __name__ == "__main__":
    asyncio.run(main())
