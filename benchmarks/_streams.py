"""Streamed answers: what an event costs, how many a core can pass on, how late they come, what a silent one holds."""

import asyncio
import time
from functools import partial
from itertools import pairwise
from statistics import median

from _bench import Bench
from _contestants import Running
from _generator import BadAnswer, Call, Crowd, Outcome, Stream
from _processes import Meter, rss_of_tree
from _requests import cost, small_posts
from _running import quantile

#: Milliseconds between two events of a stream, and how many events it has.
PACE = 50
EVENTS = 100
#: Seconds over which the beginnings of many streams are spread, so that their events come evenly.
_SPREAD = 1.0


async def paced(bench: Bench, streams: int) -> None:
    """So many streams at a time, an event per 50 ms in each."""
    measure = f"{streams} streams"
    running = bench.running
    if streams > 500 and "litellm" in running:
        bench.leave_out(measure, "litellm", _too_many(bench, streams))
        running = bench.without("litellm")

    async def once(running: Running) -> dict[str, float]:
        events = bench.some(EVENTS, 20)
        crowd = Crowd()
        try:
            found = await _run_paced(crowd, running, streams, events, bench.meter(running))
        finally:
            crowd.leave()
        return cost(found.count, found.used)

    await bench.rotate(measure, running, once)


def _too_many(bench: Bench, streams: int) -> str:
    """Return why LiteLLM is not asked for so many streams."""
    asked = f"these are {streams * 1000 // PACE:,} events a second"
    found = bench.figures.get("200 streams", {}).get("litellm", {}).get("cpu")
    return f"{asked}, and {median(found):.0f} µs for each are more than a core has" if found else f"{asked}; it stalls"


async def _run_paced(
    crowd: Crowd, running: Running, streams: int, events: int, meter: Meter, *, stamped: bool = False
) -> Outcome:
    left = streams

    def finished(call: Call) -> None:
        nonlocal left
        left -= 1
        if not left:
            crowd.finish()

    make = partial(Stream, running.stream(f"stream-{PACE}-{events}"), finished, crowd.fail)
    await crowd.connect(lambda _: make(), running.port, streams)
    loop = asyncio.get_running_loop()
    meter.begin()
    for place, call in enumerate(crowd.calls):
        call.stamped = stamped
        loop.call_later(place * _SPREAD / streams, call.ask)
    limit = _SPREAD + events * PACE / 1000 + 15
    if not await crowd.wait(limit):
        raise BadAnswer(f"{left} of {streams} streams had not ended after {limit:.0f} s")
    used = meter.end()
    found = sum(call.events for call in crowd.calls)
    if found != streams * events:
        raise BadAnswer(f"{found} events came of {streams * events}")
    return Outcome(found, used, [])


async def burst(bench: Bench) -> None:
    """32 streams at a time, each of 200 events without pause."""

    async def once(running: Running) -> dict[str, float]:
        found = await _run_again(running, "stream-0-200", 32, bench.seconds(3), bench.meter(running))
        return cost(found.count, found.used)

    await bench.rotate("burst", bench.running, once)


async def _run_again(running: Running, model: str, streams: int, seconds: float, meter: Meter) -> Outcome:
    """Ask for a stream on each connection as soon as the one before has ended, and count the events."""
    crowd = Crowd()
    make = partial(Stream, running.stream(model), lambda call: call.ask(), crowd.fail)
    try:
        await crowd.connect(lambda _: make(), running.port, streams)
        for call in crowd.calls:
            call.ask()
        await crowd.wait(0.5)
        meter.begin()
        before = sum(call.events for call in crowd.calls)
        await crowd.wait(seconds)
        used = meter.end()
        return Outcome(sum(call.events for call in crowd.calls) - before, used, [])
    finally:
        crowd.leave()


async def lateness(bench: Bench) -> None:
    """20 paced streams, and beside them short ones, one after the other, for the time to the first event."""

    async def once(running: Running) -> dict[str, float]:
        firsts: list[float] = []

        def again(call: Call) -> None:
            assert isinstance(call, Stream)
            firsts.append(call.first / 1000)
            call.ask()

        crowd, probe = Crowd(), Crowd()
        try:
            await probe.connect(lambda _: Stream(running.stream("stream-5-2"), again, crowd.fail), running.port, 1)
            probe.calls[0].ask()
            await _run_paced(crowd, running, 20, bench.some(EVENTS, 20), bench.meter(running), stamped=True)
        finally:
            crowd.leave()
            probe.leave()
        gaps = [gap for call in crowd.calls for gap in _stretched(call.late)]
        return {
            "first p50": quantile(firsts, 0.5),
            "first p99": quantile(firsts, 0.99),
            "late p50": quantile([late / 1000 for call in crowd.calls for late in call.late], 0.5),
            "gap p99": quantile(gaps, 0.99),
        }

    await bench.rotate("lateness", bench.running, once)


def _stretched(late: list[int]) -> list[float]:
    """Return by how many microseconds each gap between two events was longer, or shorter, than when they were sent."""
    return [abs(after - before) / 1000 for before, after in pairwise(late)]


async def idle(bench: Bench, streams: int) -> None:
    """So many streams that have had one event and are silent, of contestants that have done next to nothing before."""
    measure = f"{streams} idle streams"
    names = [name for name in bench.running if name not in ("direct", "litellm")]
    if "litellm" in bench.running:
        bench.leave_out(measure, "litellm", "it stalls at so many")
    with bench.fresh(names) as running:
        await bench.rotate(measure, running, partial(hold, bench, streams=streams), rounds=1)


async def hold(bench: Bench, running: Running, *, streams: int) -> dict[str, float]:
    """Measure what so many silent streams hold."""
    await small_posts(bench, running, seconds=0.5, connections=8)
    assert running.pid is not None
    before = rss_of_tree(running.pid)
    crowd = Crowd()
    try:
        while len(crowd.calls) < streams:
            await _open_some(crowd, running, min(20, streams - len(crowd.calls)))
        await asyncio.sleep(1)
        return {"KiB": (rss_of_tree(running.pid) - before) / streams / 1024}
    finally:
        crowd.leave()
        await asyncio.sleep(0.5)


async def _open_some(crowd: Crowd, running: Running, count: int) -> None:
    """Begin so many streams more, and return when each has had its first event."""
    first = len(crowd.calls)
    make = partial(Stream, running.stream("idle"), lambda _: None, crowd.fail)
    await crowd.connect(lambda _: make(), running.port, count)
    for call in crowd.calls[first:]:
        call.ask()
    deadline = time.monotonic() + 30
    while not all(call.events for call in crowd.calls[first:]):
        await crowd.wait(0.001)
        if time.monotonic() > deadline:
            raise BadAnswer(f"of {len(crowd.calls)} streams, some had no event after 30 s")
