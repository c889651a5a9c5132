"""A histogram that costs one search and one addition to feed."""

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Final

from prometheus_client.core import HistogramMetricFamily, Metric

#: Upper bounds in seconds, for what takes from a tokenised word to a long answer of a reasoning model.
BOUNDS: Final[tuple[float, ...]] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
_LABELS = [*map(str, BOUNDS), "+Inf"]


class Histogram:
    """Counts durations by ``BOUNDS``.

    :ivar total: their sum in seconds.
    """

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts = [0] * len(_LABELS)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return each bound, as Prometheus writes it, and how many durations were no longer than that."""
        return list(zip(_LABELS, accumulate(self._counts), strict=True))


def histogram_family(
    name: str,
    documentation: str,
    *,
    by_route: Mapping[str, Histogram] | None = None,
    only: Histogram | None = None,
) -> Metric:
    """Return histograms as a metric family, with a ``route`` label or without any."""
    family = HistogramMetricFamily(name, documentation, labels=() if by_route is None else ("route",))
    for route, histogram in (by_route or {}).items():
        family.add_metric([route], histogram.buckets(), histogram.total)
    if only is not None:
        family.add_metric([], only.buckets(), only.total)
    return family
