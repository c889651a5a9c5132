"""When it pays to keep what came last, so that what comes next can be compared with it. Pure."""

from typing import Final

#: After so many in a row that were not alike, one in so many is kept to see whether the next is.
_MISSES: Final = 2
_EACH: Final = 16


def is_worth_keeping(missed: int) -> bool:
    """Tell whether one is worth it that comes after so many others were not alike; the very first, 0, is the only one
    perhaps."""
    return missed > 0 and (missed <= _MISSES or missed % _EACH == 0)
