"""The reactor that the tests run in: waiting there, and what a test leaves on it."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.base import DelayedCall
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

    Not its internal readers, the wakers by which its threads and SIGCHLD reach it: they stay as long as it runs.
    """
    all_of_them = [*reactor.getDelayedCalls(), *reactor.getReaders(), *reactor.getWriters()]
    return [each for each in all_of_them if each not in reactor._internalReaders]


async def left_since(before: list[Any]) -> list[str]:
    """Return what is pending and was not ``before``, as text, when all that is being closed had its turns.

    A delayed call that was due later counts as left unless it is cancelled, though it runs out meanwhile.
    """
    known = set(map(id, before))

    def left() -> list[Any]:
        return [each for each in pending() if id(each) not in known]

    timers = [each for each in left() if isinstance(each, DelayedCall) and each.getTime() > reactor.seconds()]
    with suppress(AssertionError):
        await until(lambda: not left(), 5)
    return [*map(str, left()), *(str(timer) for timer in timers if timer.called)]
