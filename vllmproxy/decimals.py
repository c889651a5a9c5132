"""Seconds as text: half as long as what ``repr`` takes for them, and less than any of its kin where it is compiled."""

from typing import Final

#: From here on a double does not tell microseconds apart (in the year 2106).
_COARSE: Final = float(2**32)


def decimal(seconds: float) -> str:
    """Return ``seconds`` with six digits behind the point. What is read from that is written as the same."""
    if not 0 <= seconds < _COARSE:  # the clock was set back, or far on
        return f"{seconds:.6f}"
    micros = int(seconds * 1e6 + 0.5)
    return f"{micros // 1_000_000}.{str(1_000_000 + micros % 1_000_000)[1:]}"
