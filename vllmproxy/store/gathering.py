"""Calls to Redis: while one is under way, what comes meanwhile gathers, and goes together."""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: The most that go together: Redis does nothing else in that time.
MOST: Final = 64


class Gathering(Generic[T]):
    """What is to be asked, in order. One alone goes at once, so nobody waits longer than for one answer.

    :param send: has Redis run items in one call, and then calls :meth:`done` or :meth:`drop`.
    """

    def __init__(self, send: Callable[[list[T]], None]) -> None:
        self._send = send
        self._waiting: list[T] | None = None  # there is no call under way

    def add(self, item: T) -> None:
        """Ask, now or with the next call."""
        if self._waiting is None:
            self._waiting = []
            self._send([item])
        else:
            self._waiting.append(item)

    def done(self) -> None:
        """The call under way is over: make the next one, if somebody waits for that."""
        waiting = self._waiting
        if waiting:
            self._waiting = waiting[MOST:]
            self._send(waiting[:MOST])
        else:
            self._waiting = None

    def drop(self) -> list[T]:
        """The call under way failed, and the next would as well: return those that wait."""
        waiting, self._waiting = self._waiting, None
        return waiting or []
