"""The reactor that the tests run in: waiting there, and what a test leaves on it."""

import time
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.task import deferLater

reactor: Any = installed_reactor


async def until(what: Callable[[], object], seconds: float = 30) -> None:
    """Return as soon as ``what()`` is true; the reactor runs meanwhile."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s: last {result!r}"
        await deferLater(reactor, 0.005)


def pending() -> list[Any]:
    """Return the reactor's delayed calls, readers and writers.

    Not its internal readers: the wakers, by which its threads and SIGCHLD reach it, stay as long as it runs.
    """
    waiting = [*reactor.getDelayedCalls(), *reactor.getReaders(), *reactor.getWriters()]
    return [each for each in waiting if each not in reactor._internalReaders]
