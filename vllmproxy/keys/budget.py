"""How much a key may spend, and since when that counts. Pure."""

from attrs import field, frozen

from vllmproxy.keys.durations import seconds_of


@frozen(kw_only=True)
class Budget:
    """A key's budget. Money is in micro-units, times are seconds since the epoch (UTC).

    :ivar money: what may be spent in a period, ``None``: as much as there is.
    :ivar soft: what may be spent before somebody is told.
    :ivar tokens: prompt and completion tokens that may be used in a period.
    :ivar duration: of a period (:mod:`vllmproxy.keys.durations`), ``None``: there is one, without end.
    :ivar start: when the period began that counts until ``reset_at``.
    :ivar is_priced: whether it takes money to keep it.
    :ivar is_limited: whether anything has to be kept account of before a request.
    """

    money: int | None = None
    soft: int | None = None
    tokens: int | None = None
    duration: str | None = None
    start: int = 0
    reset_at: int | None = None
    is_priced: bool = field(init=False, eq=False, repr=False)
    is_limited: bool = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        is_priced = self.money is not None or self.soft is not None
        object.__setattr__(self, "is_priced", is_priced)
        object.__setattr__(self, "is_limited", is_priced or self.tokens is not None)

    def period(self, now: float) -> tuple[int, int | None]:
        """Return when the period of ``now`` began, and when it ends, if ever. Periods follow on each other."""
        start, end = self.start, self.reset_at
        while self.duration is not None and end is not None and now >= end:
            start, end = end, end + _length(self.duration, end, now)
        return start, end

    def renewed(self, duration: str | None, now: float) -> "tuple[int, int | None]":
        """Return ``start`` and ``reset_at`` for a ``duration`` that is set at ``now``: what was spent in the period of
        now stays spent until the new one is over."""
        lasts = seconds_of(duration, now)
        return self.period(now)[0], None if lasts is None else int(now) + lasts


def _length(duration: str, begin: int, now: float) -> int:
    """Return the seconds of the period that begins at ``begin``, or of as many as fit before ``now`` where all are
    equally long."""
    length = seconds_of(duration, begin)
    assert length is not None
    if duration.endswith("mo"):
        return length
    return max(length, int(now - begin) // length * length)
