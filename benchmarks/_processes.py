"""What processes use of a machine: CPU time and memory of a whole tree, and which cores it may run on."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from _running import rss_of
from attrs import frozen

#: CPUCLOCK_SCHED of Linux: with a process id, the clock that clock_getcpuclockid(3) gives.
_CPU_CLOCK = 2


def tree(pid: int) -> list[int]:
    """Return a process and all that it started, directly or not, and that still run."""
    return [pid, *(below for child in _children(pid) for below in tree(child))]


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time, user and system, that processes have used since they began, to the nanosecond."""
    return sum(time.clock_gettime((~pid) << 3 | _CPU_CLOCK) for pid in pids)


def rss_of_tree(pid: int) -> int:
    """Return the resident memory of a process and all below it, in bytes."""
    return sum(map(rss_of, tree(pid)))


def forget_peaks(pid: int) -> None:
    """Let :func:`peak_of_tree` begin anew."""
    for each in tree(pid):
        Path(f"/proc/{each}/clear_refs").write_text("5")


def peak_of_tree(pid: int) -> int:
    """Return the most resident memory that a process and all below it ever had, each at its own moment, in bytes."""
    return sum(map(_peak_of, tree(pid)))


def _peak_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def pin(pid: int, core: int) -> None:
    """Keep a process, with the threads it has, on one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


@frozen
class Used:
    """What was used while something was measured, in seconds.

    :ivar seconds: that passed.
    :ivar proxy: CPU of the proxy; ``redis``: of its store, where it has one of its own.
    :ivar load: CPU of everything on the other core: the generator, the upstream and Redis.
    """

    seconds: float
    proxy: float
    redis: float
    load: float

    def shares(self) -> dict[str, float]:
        """Return how busy the two cores were, as figures."""
        return {"proxy core": self.proxy / self.seconds, "load core": self.load / self.seconds}


class Meter:
    """Reads the clocks at the beginning and at the end of what is measured.

    :param proxy: its process, with those it started; ``None``: there is no proxy.
    """

    def __init__(self, proxy: int | None, upstream: int, redis: int | None) -> None:
        self._proxy = tree(proxy) if proxy else []
        self._redis = [redis] if redis else []
        self._load = [os.getpid(), upstream, *self._redis]
        self._began = self._read()

    def _read(self) -> tuple[float, float, float, float]:
        return time.monotonic(), *map(cpu_seconds, (self._proxy, self._redis, self._load))

    def begin(self) -> None:
        """Measure from now on."""
        self._began = self._read()

    def end(self) -> Used:
        """Return what was used since :meth:`begin`."""
        return Used(*(now - then for now, then in zip(self._read(), self._began, strict=True)))
