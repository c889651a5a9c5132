"""Large bodies, one at a time: how fast they pass, and how much memory that takes."""

import asyncio
import time
from contextlib import ExitStack
from functools import partial

from _bench import Bench
from _contestants import Running, nginx, vllmproxy_on
from _generator import Transfer
from _processes import forget_peaks, peak_of_tree, rss_of_tree
from _rows import ALL_ON, ON
from _running import HOST
from _streams import hold

#: Millions of bytes.
UPLOAD = 32
DOWNLOAD = 200


async def upload(bench: Bench) -> None:
    """A chat completion with an image of 32 MB."""
    with bench.fresh(bench.running) as running:
        await bench.rotate("upload", running, partial(_upload, bench))


async def download(bench: Bench) -> None:
    """An answer of 200 MB."""
    with bench.fresh(bench.running) as running:
        await bench.rotate("download", running, partial(_download, bench))


async def buffers(bench: Bench) -> None:
    """nginx as it is by default and with large buffers, beside everything on: large bodies, and what a stream holds."""
    if not {"nginx", ON} <= bench.running.keys():
        bench.leave_out("buffers", "nginx", "it is not compared with everything on")
        return
    place = bench.place
    measures = (
        ("upload", _upload, bench.rounds),
        ("download", _download, bench.rounds),
        ("idle streams", partial(hold, streams=2_000), 1),  # what a process keeps of one round would be the next one's
    )
    for name, once, rounds in measures:
        with ExitStack() as stack:
            running = {
                "nginx": stack.enter_context(nginx(place)),
                "nginx, buffers of 256 KiB": stack.enter_context(nginx(place, large_buffers=True)),
                ALL_ON: stack.enter_context(vllmproxy_on(place)),
            }
            await bench.rotate(f"{name} by buffers", running, partial(once, bench), rounds)


async def _upload(bench: Bench, running: Running) -> dict[str, float]:
    url = "data:image/png;base64," + "A" * (UPLOAD * 1_000_000)
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    return await _transfer(bench, running, running.request("small", body), UPLOAD)


async def _download(bench: Bench, running: Running) -> dict[str, float]:
    return await _transfer(bench, running, running.request(f"download-{DOWNLOAD}"), DOWNLOAD)


async def _transfer(bench: Bench, running: Running, request: bytes, size: int) -> dict[str, float]:
    before = 0
    if running.pid:
        forget_peaks(running.pid)
        before = rss_of_tree(running.pid)
    transport, transfer = await asyncio.get_running_loop().create_connection(Transfer, HOST, running.port)
    meter = bench.meter(running)
    rates = []
    try:
        meter.begin()
        for _ in range(bench.some(4, 2)):
            began = time.monotonic()
            await transfer.ask(request)
            rates.append(size / (time.monotonic() - began))
        used = meter.end()
    finally:
        transport.abort()
    grown = peak_of_tree(running.pid) - before if running.pid else 0
    return {"MB/s": max(rates), "growth": grown / 2**20, **used.shares()}
