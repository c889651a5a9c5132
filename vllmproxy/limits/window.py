"""The sliding window: in no W microseconds, wherever they begin, is more than the limit admitted.

What is taken is summed up in buckets. A bucket is open for W/126 and counts until the *last* of what it holds is W old,
so nothing leaves early and whatever leaves late is less than W/126 late: under steady demand all that is taken
comes back within 127/126 W, and at least 99.2 % of the limit is admitted. As buckets begin W/126 apart at least, 127 of
them reach back over W at most. ``store/limits_lua.py`` does the same in Redis.
"""

from collections import deque
from typing import Final

_BUCKETS_IN_WINDOW: Final = 126


def bucket_width(length: int) -> int:
    """Return for how long a bucket of a window of ``length`` is open, both in microseconds."""
    return -(-length // _BUCKETS_IN_WINDOW)


class Window:
    """One limit's sliding window. Times are microseconds and never go back (see :mod:`vllmproxy.limits.steady`).

    :param length: of the window.
    :ivar total: the sum of all buckets; see :meth:`prune`.
    """

    __slots__ = ("_buckets", "_first", "_length", "_start", "_width", "total")

    def __init__(self, length: int) -> None:
        self._length = length
        self._width = bucket_width(length)
        #: Of each bucket, oldest first: when it took something last, and its amount.
        self._buckets: deque[list[int]] = deque()
        #: The number of the oldest bucket; they are counted through, so that a number is never used again.
        self._first = 0
        #: When the newest bucket began.
        self._start = 0
        self.total = 0

    def __len__(self) -> int:
        """The number of buckets: 128 at most."""
        return len(self._buckets)

    def prune(self, now: int) -> None:
        """Let go of the buckets that have left."""
        while self._buckets and self._buckets[0][0] + self._length <= now:
            self.total -= self._buckets.popleft()[1]
            self._first += 1

    def wait(self, now: int, limit: int, cost: int) -> int | None:
        """Return how long it takes until ``cost`` fits: 0 if it does, ``None`` if it never does."""
        if cost > limit:
            return None
        self.prune(now)
        excess, leaves = self.total + cost - limit, now
        for last, amount in self._buckets:
            if excess <= 0:
                break
            excess, leaves = excess - amount, last + self._length
        return leaves - now

    def take(self, now: int, cost: int) -> int:
        """Add ``cost`` and return the number of the bucket it is in."""
        self.prune(now)
        if not self._buckets or now >= self._start + self._width:
            self._buckets.append([now, 0])
            self._start = now
        newest = self._buckets[-1]
        newest[0] = now
        newest[1] += cost
        self.total += cost
        return self._first + len(self._buckets) - 1

    def settle(self, bucket: int, change: int) -> None:
        """Add ``change``, which may be negative, where ``take`` put its cost. Nothing changes when that has left."""
        place = bucket - self._first
        if 0 <= place < len(self._buckets):
            self._buckets[place][1] += change
            self.total += change
