"""How long a worker that died waits before it is started again."""

from typing import Final

#: Seconds after which a worker that dies is no longer one that cannot live.
YOUNG: Final = 10.0
#: Seconds.
FIRST: Final = 1.0
LONGEST: Final = 30.0


class Backoff:
    """At once, unless it keeps dying young: then after 1 s, 2 s, 4 s … 30 s."""

    def __init__(self) -> None:
        self._next = 0.0

    def died(self, age: float) -> float:
        """Return the seconds to wait for.

        :param age: the seconds that it lived for.
        """
        delay = 0.0 if age >= YOUNG else self._next
        self._next = min(2 * delay, LONGEST) if delay else FIRST
        return delay
