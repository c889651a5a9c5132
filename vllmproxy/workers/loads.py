"""How many connections each worker has, in memory that they share, and whose turn it is to take the next one.

All workers are woken by a new connection, and which of them is there first says little of who is free: left alone, two
workers end up with 35 and 65 of 100 streams that are opened all at once.
"""

import os
from collections.abc import Callable
from mmap import mmap
from typing import Final, Self

#: What stands for a worker that does not accept.
_AWAY: Final = 2**32 - 1
#: As many more connections than another may one have before it lets that go first.
SLACK: Final = 8
#: As many times it waits for another that does not move, which may be busy, before it takes ``MANY`` at once.
PATIENCE: Final = 100
MANY: Final = 16


class Loads:
    """The numbers, by the workers', which are from 1.

    :ivar descriptor: of the memory, to hand on.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = memoryview(mmap(descriptor, 0)).cast("I")

    @classmethod
    def make(cls, workers: int) -> Self:
        """Make some for workers that do not accept yet."""
        descriptor = os.memfd_create("vllmproxy-workers")
        os.write(descriptor, b"\xff\xff\xff\xff" * workers)
        return cls(descriptor)

    def set(self, number: int, connections: int) -> None:
        """Note how many connections a worker has."""
        self._memory[number - 1] = connections

    def leave(self, number: int) -> None:
        """Note that a worker accepts no more."""
        self._memory[number - 1] = _AWAY

    def least(self, *, but: int) -> int:
        """Return how many the one has that has fewest, ``but`` for this one."""
        return min((each for number, each in enumerate(self._memory, 1) if number != but), default=_AWAY)


class Turns:
    """Tells one listener of a worker how many connections to take when there are any.

    :param mine: how many connections the worker has.
    """

    def __init__(self, loads: Loads, number: int, mine: Callable[[], int]) -> None:
        self._loads = loads
        self._number = number
        self._mine = mine
        self._waits = False
        self._least = _AWAY
        self._in_vain = 0

    def take(self) -> int:
        """Return how many to take now; 0: ask again in a moment, for it is another's turn. That is not said twice in a
        row: the other may be stuck."""
        mine = self._mine()
        self._loads.set(self._number, mine)
        least = self._loads.least(but=self._number)
        if mine <= least + SLACK:
            self._waits = False
            return 1
        self._waits = not self._waits
        if self._waits:
            return 0
        self._in_vain = self._in_vain + 1 if least == self._least else 0
        self._least = least
        return MANY if self._in_vain >= PATIENCE else 1
