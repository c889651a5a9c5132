"""Leases: things held under a name for a time, and let go by themselves when nobody renews them."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Leases(Generic[T]):
    """What is held, and until when. Times are microseconds and never go back (see :mod:`vllmproxy.limits.steady`).

    :param length: how long a lease lasts from when it was taken or renewed.
    """

    __slots__ = ("_held", "_length")

    def __init__(self, length: int) -> None:
        self._length = length
        #: When each lease ends, and the thing: soonest end first, as all leases are equally long.
        self._held: dict[str, tuple[int, T]] = {}

    def count(self, now: int) -> int:
        """Let go of the leases that have ended and return how many there are."""
        while self._held:
            name = next(iter(self._held))
            if self._held[name][0] > now:
                break
            del self._held[name]
        return len(self._held)

    def take(self, now: int, name: str, thing: T) -> None:
        """Hold ``thing`` from now on."""
        self._held.pop(name, None)
        self._held[name] = now + self._length, thing

    def get(self, now: int, name: str) -> T | None:
        """Return what is held under ``name``."""
        end, thing = self._held.get(name, (now, None))
        return thing if end > now else None

    def renew(self, now: int, name: str) -> bool:
        """Let the lease last as long again; false if there is none any more."""
        end, thing = self._held.pop(name, (now, None))
        if end <= now or thing is None:
            return False
        self.take(now, name, thing)
        return True

    def end(self, name: str) -> None:
        """Let go of it, if it is held."""
        self._held.pop(name, None)
