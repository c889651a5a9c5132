"""How long things last, in whole microseconds; the same in every twin."""

from typing import Self

from attrs import frozen

from vllmproxy.limits.window import bucket_width


@frozen
class Spans:
    """The lengths of time that the limits know.

    :ivar window: of the limits for requests and tokens.
    :ivar lease: of ``max_parallel_requests``, from when it was taken or renewed.
    :ivar memory: for how long a settled request's id is known: longer than any deadline by far.
    """

    window: int
    lease: int
    memory: int = 5_000_000

    @classmethod
    def of(cls, window: float, lease: float) -> Self:
        """Take seconds."""
        return cls(micros(window), micros(lease))

    @property
    def kept(self) -> int:
        """For how long a reservation is kept that is neither renewed nor settled: as long as it counts anywhere."""
        return max(self.window + bucket_width(self.window), self.lease, self.memory)


def micros(seconds: float) -> int:
    """Return seconds as the nearest microsecond."""
    return round(seconds * 1_000_000)
