"""What becomes of POSTs that meet a connection to vLLM in the moment in which vLLM closes it?

    python benchmarks/keepalive_edge.py --requests 10000

Before the proxy is a simulated vLLM whose keep-alive, 1 s, is shorter than the time that the proxy keeps an idle
connection (2.5 s): a shorter uvicorn's, so that every reuse is at the edge. Many clients ask in waves, each after a
pause around the keep-alive that is drawn by lot for each wave (``--spread``) and each client (a few ms). Every POST has
an id by which the upstream counts what it executed. Printed are the answers, the connections, how many of the POSTs
were executed twice, and how many of those that were answered well were not executed once.
"""

import argparse
import asyncio
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from _running import HOST, allow_many_files, free_port, process, proxy_before

BODY = b'{"model":"qwen2.5-7b-instruct","prompt":"hi","max_tokens":1}'
POST = (
    b"POST /vllm/v1/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    b"X-Request-Id: edge-%d\r\nContent-Length: %d\r\n\r\n%s"
)


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> str:
    """Ask, and return the status of the answer, or what came instead."""
    writer.write(POST % (number, len(BODY), BODY))
    try:
        async with asyncio.timeout(30):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        return repr(error)
    return head.split(None, 2)[1].decode()


async def ask_in_waves(port: int, requests: int, clients: int, keep_alive: float, spread: float) -> dict[int, str]:
    """Ask that often, and return what became of each."""
    lot = random.Random(0)
    outcomes: dict[int, str] = {}
    wires = await asyncio.gather(*(asyncio.open_connection(HOST, port) for _ in range(clients)))

    async def one(client: int, number: int, late: float) -> None:
        await asyncio.sleep(late)
        outcomes[number] = await post(*wires[client], number)
        if not outcomes[number].isdigit():
            wires[client] = await asyncio.open_connection(HOST, port)

    for first in range(0, requests, clients):
        count = min(clients, requests - first)
        await asyncio.gather(*(one(each, first + each, lot.uniform(0, 0.02)) for each in range(count)))
        await asyncio.sleep(max(keep_alive + lot.uniform(-spread, spread) - 0.02, 0))
    for _, writer in wires:
        writer.close()
    return outcomes


def stats_of(upstream: int) -> dict[str, object]:
    """Return what the simulated vLLM has counted."""
    connection = http.client.HTTPConnection(HOST, upstream, timeout=30)
    connection.request("GET", "/vllmsim/stats")
    found: dict[str, object] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def report(outcomes: dict[int, str], stats: dict[str, object], took: float) -> None:
    """Compare what clients were told with what the upstream did."""
    executed = stats["executed"]
    assert isinstance(executed, dict)
    times = {number: executed.get(f"edge-{number}", 0) for number in outcomes}
    answers = Counter(outcomes.values())
    errors = [number for number, outcome in outcomes.items() if outcome != "200"]
    print(f"{len(outcomes)} POSTs in {took:.0f} s over {stats['connections_total']} connections to the upstream")
    print(f"answers: {dict(answers)}; client errors: {len(errors)}")
    print(f"    of the errors were executed: {sum(times[number] > 0 for number in errors)}")
    print(f"executed twice: {sum(count > 1 for count in times.values())}")
    print(f"answered 200, but not executed once: {sum(times[n] != 1 for n, out in outcomes.items() if out == '200')}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--keep-alive", type=float, default=1.0, help="of the simulated vLLM")
    parser.add_argument("--spread", type=float, default=0.03, help="seconds that a pause differs from it at most")
    options = parser.parse_args()
    allow_many_files()
    upstream = free_port()
    twistd = (str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile=")
    simulator = (*twistd, "vllmsim", "--listen", f"tcp:{upstream}:interface={HOST}", "--ttft", "0")
    keep_alive = options.keep_alive
    with (
        tempfile.TemporaryDirectory() as directory,
        process(*simulator, "--keep-alive", str(keep_alive), port=upstream, cwd=directory),
        proxy_before(upstream) as (_, port),
    ):
        began = time.monotonic()
        asked = ask_in_waves(port, options.requests, options.clients, keep_alive, options.spread)
        outcomes = asyncio.run(asked)
        report(outcomes, stats_of(upstream), time.monotonic() - began)


if __name__ == "__main__":
    main()
