"""Calls to Redis for one key: while one is under way, those that come meanwhile gather, and go together."""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: The most that go together: Redis does nothing else in that time.
MOST: Final = 64


class Gathering(Generic[T]):
    """What is to be asked, in order, by key. One alone goes at once, so nobody waits longer than for one answer.

    :param send: has Redis run a key's items in one call, and then calls :meth:`done` or :meth:`drop`.
    """

    def __init__(self, send: Callable[[str, list[T]], None]) -> None:
        self._send = send
        self._waiting: dict[str, list[T]] = {}  # of each key that has a call under way

    def add(self, key: str, item: T) -> None:
        """Ask, now or with the next call."""
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = []
            self._send(key, [item])
        else:
            waiting.append(item)

    def done(self, key: str) -> None:
        """The call under way is over: make the next one, if somebody waits for that."""
        waiting = self._waiting[key]
        if waiting:
            self._waiting[key] = waiting[MOST:]
            self._send(key, waiting[:MOST])
        else:
            del self._waiting[key]

    def drop(self, key: str) -> list[T]:
        """The call under way failed, and the next would as well: return those that wait."""
        return self._waiting.pop(key)
