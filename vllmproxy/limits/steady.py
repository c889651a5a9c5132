"""Time that never goes back, out of a clock that may be set."""


class Steady:
    """While the clock was set back no time has passed; from then on it goes on as the clock does.

    So what waits for time to pass waits a little longer at worst, and not for as long as the clock was set back.
    """

    __slots__ = ("_latest", "_offset")

    def __init__(self) -> None:
        self._latest = 0
        self._offset = 0

    def at(self, now: int) -> int:
        """Return the steady time when the clock says ``now``; both in the same unit."""
        steady = max(now + self._offset, self._latest)
        self._latest = steady
        self._offset = steady - now
        return steady
