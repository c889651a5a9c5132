"""What becomes of the cost when there is more: keys, limits and worker processes; and how soon the proxy is there."""

import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from _bench import Bench
from _contestants import LIMITS, OURS, PLENTY, Running, vllmproxy_on
from _requests import small_posts

#: How many keys there are in the store.
KEYS = (1, 10, 1_000, 100_000)
#: Connections of the load on workers: more than each can answer in the moment that it has the core.
_CALLERS = 256


async def start_up(bench: Bench) -> None:
    """From the start of the process to the first request answered; LiteLLM, which takes long, once."""

    async def once(running: Running) -> dict[str, float]:
        with bench.fresh([running.name]) as started:
            return {"seconds": started[running.name].seconds}

    await bench.rotate("start-up", bench.without("direct", "litellm"), once)
    if "litellm" in bench.running:
        bench.record("start-up", "litellm", seconds=bench.running["litellm"].seconds)


async def keys(bench: Bench) -> None:
    """1 to 100,000 keys in the store: requests with ten of them at most, and with all of them in turn."""
    if not _has_on(bench, "keys"):
        return
    with ExitStack() as stack:
        proxies = {count: stack.enter_context(vllmproxy_on(bench.place, keys=count)) for count in KEYS}
        for used in ("ten of them", "all of them"):
            running = {f"{count:,} key{'s' * (count > 1)}": proxy for count, proxy in proxies.items()}
            most = 10 if used == "ten of them" else max(KEYS)
            asked = {
                proxy.port: [proxy.with_key(n).request("small") for n in range(min(count, most))]
                for count, proxy in proxies.items()
            }
            await bench.rotate(
                f"keys, {used}", running, lambda proxy, asked=asked: small_posts(bench, proxy, asked[proxy.port], 2)
            )


async def limits(bench: Bench) -> None:
    """One limit of the key, the three of everything on, twenty of which a request meets five, and a budget besides."""
    if not _has_on(bench, "limits"):
        return
    models = dict.fromkeys(("small", *(f"model-{n}" for n in range(8))), PLENTY)
    some = {name: limit for name, limit in models.items() if name != "model-7"}
    twenty = {**LIMITS, "model_rpm_limit": models, "model_tpm_limit": some}
    variants = {
        "1 limit": {"tpm_limit": PLENTY},
        "3 limits": LIMITS,
        "20 limits": twenty,
        "20 limits and a budget": {**twenty, "max_budget_tokens": PLENTY},
    }
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(vllmproxy_on(bench.place, limits=fields)) for name, fields in variants.items()
        }
        await bench.rotate("limits", running, partial(small_posts, bench, seconds=2))


async def workers(bench: Bench) -> None:
    """One worker process and two, each with a quarter of a core: the rest of it is spun away by other processes.

    So the load, on the other core, is never the limit, and two cores are enough to see whether the work is shared. The
    keys have no limits: with so many callers and so little of a core, a store's deadline would pass while they queue.
    """
    if not _has_on(bench, "workers"):
        return
    if not _takes_workers():
        bench.leave_out("workers", "vllmproxy-on", "this version has no --workers")
        return

    async def once(running: Running) -> dict[str, float]:
        with ExitStack() as stack:
            for _ in range(4 - count_of[running.port]):
                stack.enter_context(_spinning(bench.place.proxy_core))
            return await small_posts(bench, running, seconds=4, connections=_CALLERS)

    with ExitStack() as stack:
        one, two = (stack.enter_context(vllmproxy_on(bench.place, limits={}, workers=count)) for count in (1, 2))
        count_of = {one.port: 1, two.port: 2}
        await bench.rotate("workers", {"1 worker": one, "2 workers": two}, once, rounds=2 * bench.rounds - 1)


def _takes_workers() -> bool:
    twistd = Path(sys.executable).with_name("twistd")
    said = subprocess.run([twistd, "vllmproxy", "--help"], check=False, capture_output=True, text=True)
    return "--workers=" in said.stdout


def _spinning(core: int) -> "subprocess.Popen[bytes]":
    """Take a core's time for as long as the block lasts."""
    return _Spinner(["taskset", "-c", str(core), sys.executable, "-c", "while True: pass"])


class _Spinner(subprocess.Popen[bytes]):
    def __exit__(self, *reason: object) -> None:
        self.kill()
        self.wait()


def _has_on(bench: Bench, measure: str) -> bool:
    if OURS[0] in bench.running:
        return True
    bench.leave_out(measure, OURS[0], "it is not among the contestants")
    return False
