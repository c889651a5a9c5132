"""The numbers of several processes as those of one: for Prometheus, which asks whichever of them accepts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from attrs import define, field
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

#: Families that say something of a process, not of the service: each has its own, by the label ``worker``.
_PER_PROCESS: Final = ("process_", "python_")
#: Those that never fall, so that what a process had counted is kept when it ends.
_LASTING: Final = frozenset(("counter", "histogram"))

#: Metric families as they travel: name, documentation, type, and samples of name, labels and value.
Shown = list[tuple[str, str, str, list[tuple[str, Mapping[str, str], float]]]]


def shown(families: Iterable[Metric]) -> Shown:
    """Return ``families`` as what JSON can carry."""
    return [
        (
            each.name,
            each.documentation,
            each.type,
            [(sample.name, sample.labels, sample.value) for sample in each.samples],
        )
        for each in families
    ]


@define
class _Family:
    documentation: str
    type: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(factory=dict)


class Sums(Collector):
    """Adds up families by their names and labels."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, families: Iterable[Any], worker: str) -> None:
        """Add what a process shows.

        :param families: see :data:`Shown`.
        :param worker: its name.
        """
        for name, documentation, type, samples in families:
            label = {"worker": worker} if name.startswith(_PER_PROCESS) else {}
            self._add(name, documentation, type, samples, label)

    def keep(self, families: Iterable[Any]) -> None:
        """Add what has to outlive the process that shows it."""
        for name, documentation, type, samples in families:
            if type in _LASTING and not name.startswith(_PER_PROCESS):
                self._add(name, documentation, type, samples, {})

    def _add(self, name: str, documentation: str, type: str, samples: Iterable[Any], more: Mapping[str, str]) -> None:
        sums = self._families.setdefault(name, _Family(documentation, type)).samples
        for sample, labels, value in samples:
            key = (sample, tuple({**labels, **more}.items()))
            sums[key] = sums.get(key, 0) + value

    def shown(self) -> Shown:
        """Return the sums."""
        return [
            (
                name,
                each.documentation,
                each.type,
                [(sample, dict(labels), value) for (sample, labels), value in each.samples.items()],
            )
            for name, each in self._families.items()
        ]

    def collect(self) -> Iterator[Metric]:
        """Yield the sums as metric families; called by Prometheus' client."""
        for name, each in self._families.items():
            family = Metric(name, each.documentation, each.type)
            for (sample, labels), value in each.samples.items():
                family.add_sample(sample, dict(labels), value)
            yield family
