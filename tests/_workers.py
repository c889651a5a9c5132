"""Proxies of several processes, and what tells of each of these."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from _asking import ask, until
from _raw import Wire
from _redis import RedisServer
from _service import START_SECONDS, Twistd, start_proxy
from attrs import frozen


def start_workers(
    directory: Path, upstream: str, redis: RedisServer, *options: str, env: dict[str, str] | None = None
) -> Twistd:
    """Start a proxy with two workers and return when both accept."""
    state = ("--state-directory", str(directory / "state"))
    service = start_proxy(directory, upstream, "--store", redis.url, "--workers", "2", *state, *options, env=env)
    until(lambda: "with 2 workers" in service.log, START_SECONDS)
    return service


def workers(service: Twistd) -> list[int]:
    """Return the process ids of the workers that there are."""
    parent = service.process.pid
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def both_again(service: Twistd, killed: int) -> None:
    """Wait until there are two workers, without the one that was killed, and both accept."""
    until(lambda: len(workers(service)) == 2 and killed not in workers(service), START_SECONDS)
    until(lambda: ask(service, "GET", "/health/readiness").json()["workers"]["ready"] == 2, START_SECONDS)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def connections(pid: int, port: int) -> int:
    """Return how many connections from clients a process has on its listener's port."""
    return len(_sockets(pid) & {each.inode for each in _established() if each.local == port})


def serving(service: Twistd, wire: Wire) -> int:
    """Return the process id of the worker that has taken a connection."""
    client = wire.sock.getsockname()[1]

    def find() -> int | None:
        inodes = {each.inode for each in _established() if (each.local, each.remote) == (service.port, client)}
        return next((pid for pid in workers(service) if inodes & _sockets(pid)), None)

    found = until(find)
    assert found is not None
    return found


def one_on_each(service: Twistd, connect: Callable[[Twistd], Wire]) -> dict[int, Wire]:
    """Connect until each worker has a connection; return one for each, by process id."""
    found: dict[int, Wire] = {}
    deadline = time.monotonic() + START_SECONDS
    while len(found) < 2:
        assert time.monotonic() < deadline
        wire = connect(service)
        if found.setdefault(serving(service, wire), wire) is not wire:
            wire.close()
    return found


def metric(text: str, name: str) -> float:
    """Return the value of one sample, its labels as they are written."""
    (value,) = re.findall(rf"(?m)^{re.escape(name)} (\S+)$", text)
    return float(value)


@frozen
class _Connection:
    local: int
    remote: int
    inode: int


def _established() -> list[_Connection]:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [
        _Connection(int(each[1].partition(":")[2], 16), int(each[2].partition(":")[2], 16), int(each[9]))
        for each in fields
        if each[3] == "01"
    ]


def _sockets(pid: int) -> set[int]:
    inodes = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes
