"""What does the proxy cost, beside others that do the same or less?

    pip install '.[bench,test]'
    python benchmarks/compare.py

It starts everything on loopback: an upstream that answers as vLLM does, a load generator, and each contestant, which
has one core to itself while it is measured. ``docs/performance.md`` says what is measured, and how. It writes
``results.md``, ``results.png`` and ``results.json``.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

try:
    import uvloop
except ModuleNotFoundError:
    raise SystemExit("The benchmark needs more than the proxy does: pip install '.[bench,test]'") from None
from _bench import Bench, default_peers
from _contestants import CONTESTANTS, Place
from _growth import keys, limits, start_up, workers
from _peers import environment, missing
from _picture import draw
from _report import report
from _requests import latency, part_load, requests, small_posts
from _running import HERE, allow_many_files, free_port, process
from _streams import burst, idle, lateness, paced
from _transfers import buffers, download, upload

MEASURES: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "requests": requests,
    "streams-200": partial(paced, streams=200),
    "streams-1000": partial(paced, streams=1_000),
    "burst": burst,
    "latency": latency,
    "half-load": partial(part_load, measure="half load", share=1 / 2),
    "quarter-load": partial(part_load, measure="quarter load", share=1 / 4),
    "lateness": lateness,
    "idle-2000": partial(idle, streams=2_000),
    "idle-9500": partial(idle, streams=9_500),
    "upload": upload,
    "download": download,
    "buffers": buffers,
    "start-up": start_up,
    "keys": keys,
    "limits": limits,
    "workers": workers,
}


def main() -> None:
    """Run it."""
    options = _parse()
    allow_many_files()
    load_core, proxy_core = options.cores
    os.sched_setaffinity(0, {load_core})
    reasons = missing(options.contestants, options.peers)
    names = tuple(name for name in CONTESTANTS if name in options.contestants and name not in reasons)
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as directory,
        process(sys.executable, str(HERE / "_canned.py"), str(port), port=port, cwd=directory) as upstream,
    ):
        place = Place(port, upstream.pid, load_core, proxy_core, options.peers)
        bench = Bench(place, options.rounds, options.quick, names)
        began = time.monotonic()
        uvloop.run(_measure(bench, options.only))
        took = time.monotonic() - began
    results = {
        "environment": {**environment(names), "took": f"{took / 60:.0f} minutes", "rounds": str(options.rounds)},
        "quick": options.quick,
        "contestants": names,
        "missing": reasons,
        "figures": bench.figures,
        "left out": bench.left_out,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results)
    (options.out / "results.md").write_text(text)
    draw(results, options.out / "results.png")
    print(f"\n{text}")


async def _measure(bench: Bench, only: list[str]) -> None:
    gc.freeze()
    gc.disable()  # the generator makes no cycles; Bench collects between measures
    with ExitStack() as stack:
        for name in bench.names:
            _start(bench, stack, name)
        await bench.rotate("warm-up", bench.running, partial(small_posts, bench, seconds=2), rounds=1)
        del bench.figures["warm-up"]
        for name in only:
            await MEASURES[name](bench)
            await asyncio.sleep(0.2)


def _start(bench: Bench, stack: ExitStack, name: str) -> None:
    try:
        bench.running[name] = stack.enter_context(CONTESTANTS[name](bench.place))
    except SystemExit as error:
        bench.leave_out("everything", name, f"it does not start ({(str(error).splitlines() or [''])[-1]})")
    else:
        print(f"{name} is up", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        type=_some_of(MEASURES),
        default=list(MEASURES),
        metavar="NAME,…",
        help=f"measures, of {', '.join(MEASURES)}",
    )
    contestants = f"of {', '.join(CONTESTANTS)}"
    parser.add_argument(
        "--contestants", type=_some_of(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME,…", help=contestants
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each measure (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="measure everything shortly, to see that it works")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory for the results (%(default)s)")
    parser.add_argument(
        "--peers", type=Path, default=default_peers(), help="directory to install the peers in (%(default)s)"
    )
    parser.add_argument(
        "--cores", type=_two_cores, default=_default_cores(), metavar="LOAD,PROXY", help="numbers of the cores"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def _some_of(known: dict[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        asked = text.split(",")
        unknown = set(asked) - known.keys()
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return [name for name in known if name in asked]

    return parse


def _two_cores(text: str) -> tuple[int, int]:
    load, proxy = map(int, text.split(","))
    return load, proxy


def _default_cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


if __name__ == "__main__":
    main()
