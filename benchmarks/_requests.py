"""Small requests: what each costs, how many a core can answer, and how long each takes."""

from statistics import median

from _bench import Bench
from _contestants import Running
from _generator import closed_loop, open_loop
from _processes import Used


def cost(count: int, used: Used) -> dict[str, float]:
    """Return the figures of so many requests or events."""
    return {
        "cpu": used.proxy / count * 1e6,
        "redis cpu": used.redis / count * 1e6,
        "rate": count / used.seconds,
        **used.shares(),
    }


async def requests(bench: Bench) -> None:
    """32 connections, each asks as soon as it has its answer."""
    await bench.rotate("requests", bench.running, lambda running: small_posts(bench, running))


async def small_posts(
    bench: Bench, running: Running, requests: list[bytes] | None = None, seconds: float = 3, connections: int = 32
) -> dict[str, float]:
    """Ask for something small all the time. ``requests``: asked in turn, else those of one caller."""
    asked = requests or running.small()
    outcome = await closed_loop(running.port, asked, connections, bench.seconds(seconds), bench.meter(running))
    return cost(outcome.count, outcome.used)


async def latency(bench: Bench) -> None:
    """One connection, one request at a time."""

    async def once(running: Running) -> dict[str, float]:
        meter = bench.meter(running)
        outcome = await closed_loop(running.port, running.small(), 1, bench.seconds(2), meter)
        return {"p50": outcome.quantile(0.5), "p99": outcome.quantile(0.99)}

    await bench.rotate("latency", bench.running, once)


async def part_load(bench: Bench, measure: str, share: float) -> None:
    """The same rate for all: that share of what the slowest of them bears, LiteLLM aside, which bears less."""
    if "requests" not in bench.figures:
        await requests(bench)
    rates = [median(found["rate"]) for name, found in bench.figures["requests"].items() if name != "litellm"]
    rate = min(rates) * share
    if "litellm" in bench.running:
        bench.leave_out(measure, "litellm", "it bears less than this rate")

    async def once(running: Running) -> dict[str, float]:
        seconds = bench.seconds(3)
        outcome = await open_loop(
            running.port,
            running.small(),
            rate=rate,
            connections=64,
            seconds=seconds,
            meter=bench.meter(running),
        )
        return {
            "p50": outcome.quantile(0.5),
            "p99": outcome.quantile(0.99),
            "asked": rate,
            **cost(outcome.count, outcome.used),
        }

    await bench.rotate(measure, bench.without("litellm"), once)
