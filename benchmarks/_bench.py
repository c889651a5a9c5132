"""One run of ``compare.py``: who runs, how often, and what came of it."""

import asyncio
import gc
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _contestants import CONTESTANTS, Place, Running
from _generator import BadAnswer
from _processes import Meter
from attrs import field, frozen

#: measure → contestant or variant → figure → its value in each round.
Figures = dict[str, dict[str, dict[str, list[float]]]]

#: Measures a contestant once and returns the figures.
Once = Callable[[Running], Awaitable[dict[str, float]]]


@frozen
class Bench:
    """What the measures work with.

    :ivar rounds: each measures every contestant once, in another order.
    :ivar quick: everything is short, to see that it works; the figures mean little.
    :ivar names: of the contestants, in the order of the tables.
    :ivar running: those that are up; see :meth:`start`.
    :ivar figures: what was measured so far.
    :ivar left_out: what was not measured, and why: measure → contestant → reason.
    """

    place: Place
    rounds: int
    quick: bool
    names: tuple[str, ...]
    running: dict[str, Running] = field(factory=dict)
    figures: Figures = field(factory=dict)
    left_out: dict[str, dict[str, str]] = field(factory=dict)

    def seconds(self, normal: float) -> float:
        """Return how long to measure."""
        return min(normal, 1.0) if self.quick else normal

    def some(self, normal: int, quick: int) -> int:
        """Return how much to measure."""
        return quick if self.quick else normal

    def meter(self, running: Running) -> Meter:
        """Return what measures a contestant's CPU time."""
        return Meter(running.pid, self.place.upstream_pid, running.redis)

    def record(self, measure: str, name: str, **figures: float) -> None:
        """Keep what one round gave."""
        kept = self.figures.setdefault(measure, {}).setdefault(name, {})
        for figure, value in figures.items():
            kept.setdefault(figure, []).append(value)

    def leave_out(self, measure: str, name: str, reason: str) -> None:
        """Say why there is no such figure."""
        told = self.left_out.setdefault(measure, {})
        told[name] = f"{told[name]}; {reason}" if name in told else reason
        print(f"{measure}, {name}: left out, {reason}", flush=True)

    @contextmanager
    def fresh(self, names: Iterable[str]) -> Iterator[dict[str, Running]]:
        """Start contestants that have done nothing yet."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(CONTESTANTS[name](self.place)) for name in names}

    async def rotate(
        self,
        measure: str,
        running: dict[str, Running],
        once: Once,
        rounds: int | None = None,
    ) -> None:
        """Measure each of ``running`` once in each round and keep the figures, in the order of ``running``."""
        kept = self.figures.setdefault(measure, {})
        kept |= {name: {} for name in running}
        for number in range(rounds or self.rounds):
            names = list(running)
            random.Random(f"{measure} {number}").shuffle(names)  # so that who comes before whom changes, too
            for name in names:
                figures = await self._tried(measure, number + 1, running[name], once)
                if figures is not None:
                    self.record(measure, name, **figures)
                    print(f"{measure}, round {number + 1}, {name}: {_told(figures)}", flush=True)
        for name in [name for name, figures in kept.items() if not figures]:
            del kept[name]

    async def _tried(self, measure: str, number: int, running: Running, once: Once) -> dict[str, float] | None:
        """Return what one round gave; one that fails is told of and tried again, twice."""
        reasons: list[str] = []
        while len(reasons) < 3:
            gc.collect()
            try:
                figures = await once(running)
            except (BadAnswer, OSError) as error:  # OSError: the process has ended
                reasons.append(_first_line(error))
                print(f"{measure}, round {number}, {running.name}: {reasons[-1]}", flush=True)
                await asyncio.sleep(1)
            else:
                if reasons:
                    self.leave_out(
                        measure, running.name, f"round {number} was good at try {len(reasons) + 1}, {reasons[-1]}"
                    )
                return figures
        self.leave_out(measure, running.name, f"round {number} failed three times, {reasons[-1]}")
        return None

    def without(self, *names: str) -> dict[str, Running]:
        """Return those that are up, but for some."""
        return {name: running for name, running in self.running.items() if name not in names}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _told(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def default_peers() -> Path:
    """Return where the peers are installed unless told otherwise."""
    return Path.home() / ".cache" / "vllmproxy-benchmarks" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
