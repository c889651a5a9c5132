"""What the tables of ``compare.py`` show, row by row, and the bars that issue 5 sets. Pure."""

from operator import truediv
from statistics import median
from typing import Any

from attrs import frozen

#: The whole result as ``results.json`` holds it.
Results = dict[str, Any]
ON = "vllmproxy-on"


@frozen
class Bar:
    """What is asked of a figure.

    :ivar least: it has to be this or more, else this or less.
    :ivar limit: a number of the row's unit; where ``of`` is given, times the other's figure.
    :ivar of: another contestant or variant.
    """

    limit: float
    least: bool = False
    of: str | None = None

    def is_met(self, value: float, other: float | None) -> bool | None:
        """Tell whether ``value`` is good enough; ``None``: the other was not measured."""
        if self.of is None:
            other = 1.0
        if other is None:
            return None
        return value >= self.limit * other if self.least else value <= self.limit * other


@frozen
class Row:
    """One figure of one measure.

    :ivar added: what is over that of ``direct`` counts.
    :ivar whose: the contestant or variant that the bars are for.
    :ivar limited: the figure is only true where the proxy's core was full.
    """

    what: str
    measure: str
    figure: str
    bars: tuple[Bar, ...] = ()
    added: bool = False
    whose: str = ON
    limited: bool = False

    def value(self, results: Results, name: str) -> float | None:
        """Return the median of the rounds, ``None`` where it was not measured."""
        found = self._rounds(results, name)
        if not found:
            return None
        if not self.added:
            return median(found)
        direct = self._rounds(results, "direct")
        return median(found) - median(direct) if direct and name != "direct" else None

    def spread(self, results: Results, name: str) -> tuple[float, float] | None:
        """Return the least and the most that a round gave, ``None`` where there was one round only, or what it is to be
        compared with has not as many."""
        found = self._rounds(results, name)
        if self.added:
            direct = self._rounds(results, "direct")
            found = [value - other for value, other in zip(found, direct, strict=True)] if _pair(found, direct) else []
        return (min(found), max(found)) if len(found) > 1 else None

    def ratio(self, results: Results, name: str, other: str) -> float | None:
        """Return the median of the ratios of one variant to another that the rounds gave; ``None`` where either was not
        measured, or in some rounds only."""
        found, beside = self._rounds(results, name), self._rounds(results, other)
        return median(map(truediv, found, beside)) if _pair(found, beside) else None

    def _rounds(self, results: Results, name: str) -> list[float]:
        rounds: list[float] = results["figures"].get(self.measure, {}).get(name, {}).get(self.figure, [])
        return rounds


def _pair(found: list[float], beside: list[float]) -> bool:
    """Tell whether each of the two was measured in every round."""
    return len(found) == len(beside) > 0


_AS_ROUTER = Bar(1.0, of="vllm-router")
_MILLISECOND = Bar(1000)

#: One column for each contestant.
ROWS = (
    Row("CPU per small POST, µs", "requests", "cpu", (Bar(0.9, of="vllm-router"),)),
    Row("… of its Redis, µs", "requests", "redis cpu"),
    Row(
        "requests a second on one core",
        "requests",
        "rate",
        (Bar(1.1, least=True, of="vllm-router"), Bar(60, least=True, of="litellm")),
        limited=True,
    ),
    Row("CPU per streamed event, 200 streams, µs", "200 streams", "cpu", (_AS_ROUTER,)),
    Row("CPU per streamed event, 1,000 streams, µs", "1000 streams", "cpu", (_AS_ROUTER,)),
    Row("events a second, burst", "burst", "rate", (Bar(1.0, least=True, of="vllm-router"),), limited=True),
    Row("added latency, one connection, p50, µs", "latency", "p50", (_AS_ROUTER,), added=True),
    Row("added latency, one connection, p99, µs", "latency", "p99", (_AS_ROUTER, _MILLISECOND), added=True),
    Row("added latency, half load, p50, µs", "half load", "p50", (_AS_ROUTER,), added=True),
    Row("added latency, half load, p99, µs", "half load", "p99", (_AS_ROUTER, _MILLISECOND), added=True),
    Row("… at so many requests a second", "half load", "asked"),
    Row("… of which so many were answered", "half load", "rate"),
    Row("… CPU per small POST, µs", "half load", "cpu"),
    Row("added latency, a quarter of the load, p50, µs", "quarter load", "p50", added=True),
    Row("added latency, a quarter of the load, p99, µs", "quarter load", "p99", added=True),
    Row("… at so many requests a second", "quarter load", "asked"),
    Row("… CPU per small POST, µs", "quarter load", "cpu"),
    Row("time to first event, added, p50, µs", "lateness", "first p50", (_MILLISECOND,), added=True),
    Row("time to first event, added, p99, µs", "lateness", "first p99", (_MILLISECOND,), added=True),
    Row("gap between events, added, p99, µs", "lateness", "gap p99", (_MILLISECOND,), added=True),
    Row("memory per idle stream, 2,000 streams, KiB", "2000 idle streams", "KiB", (Bar(24),)),
    Row("memory per idle stream, 9,500 streams, KiB", "9500 idle streams", "KiB", (Bar(24),)),
    Row("upload of 32 MB, MB/s", "upload", "MB/s", (Bar(0.8, least=True, of="nginx"),)),
    Row("… memory grown by, MiB", "upload", "growth", (Bar(8),)),
    Row("download of 200 MB, MB/s", "download", "MB/s", (Bar(0.8, least=True, of="nginx"),)),
    Row("… memory grown by, MiB", "download", "growth", (Bar(8),)),
    Row("start-up to the first answer, s", "start-up", "seconds", (Bar(1.0),)),
)

_FLAT = 1.15
#: What everything on is called among variants of others.
ALL_ON = "vllmproxy, all on"

#: One column for each variant; the bar is for one against another, as the median of the rounds' ratios.
GROWTH = (
    Row("upload of 32 MB, MB/s", "upload by buffers", "MB/s", whose=ALL_ON),
    Row("download of 200 MB, MB/s", "download by buffers", "MB/s", whose=ALL_ON),
    Row("memory per idle stream, 2,000 streams, KiB", "idle streams by buffers", "KiB", whose=ALL_ON),
    Row(
        "CPU per small POST with ten keys of so many in the store, µs",
        "keys, ten of them",
        "cpu",
        (Bar(_FLAT, of="10 keys"),),
        whose="100,000 keys",
    ),
    Row("… of its Redis, µs", "keys, ten of them", "redis cpu", whose="100,000 keys"),
    Row(
        "CPU per small POST with all of the keys in turn, µs",
        "keys, all of them",
        "cpu",
        (Bar(_FLAT, of="10 keys"),),
        whose="100,000 keys",
    ),
    Row("… of its Redis, µs", "keys, all of them", "redis cpu", whose="100,000 keys"),
    Row("CPU per small POST by limits of the key, µs", "limits", "cpu", (Bar(_FLAT, of="1 limit"),), whose="20 limits"),
    Row("… with a budget, too, µs", "limits", "cpu", (Bar(_FLAT, of="1 limit"),), whose="20 limits and a budget"),
    Row("… of its Redis, µs", "limits", "redis cpu", whose="20 limits"),
    Row(
        "requests a second, each worker with a quarter of a core",
        "workers",
        "rate",
        (Bar(1.8, least=True, of="1 worker"),),
        whose="2 workers",
    ),
    Row("… share of the core that they had", "workers", "proxy core", whose="2 workers"),
    Row("… CPU per small POST, µs", "workers", "cpu", whose="2 workers"),
)
