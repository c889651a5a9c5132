"""Large bodies, one at a time: how fast they pass, and how much memory that takes."""

import asyncio
import time

from _bench import Bench
from _contestants import Running
from _generator import Transfer
from _processes import forget_peaks, peak_of_tree, rss_of_tree
from _running import HOST

#: Millions of bytes.
UPLOAD = 32
DOWNLOAD = 200


async def upload(bench: Bench) -> None:
    """A chat completion with an image of 32 MB."""
    url = "data:image/png;base64," + "A" * (UPLOAD * 1_000_000)
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    await _transfer(bench, "upload", "small", UPLOAD, body)


async def download(bench: Bench) -> None:
    """An answer of 200 MB."""
    await _transfer(bench, "download", f"download-{DOWNLOAD}", DOWNLOAD, None)


async def _transfer(bench: Bench, measure: str, model: str, size: int, body: dict[str, object] | None) -> None:
    async def once(running: Running) -> dict[str, float]:
        request = running.request(model, body)
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

    with bench.fresh(bench.running) as running:
        await bench.rotate(measure, running, once)
