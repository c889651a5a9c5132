"""Values as pydantic's lax mode takes them, which vLLM's request models are read in (checked with vLLM 0.32)."""

import re
from typing import Final

#: The largest count that is handed on. More is as good as no bound, and sums of this stay exact in a double.
MOST: Final = 1 << 31

_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE: Final = frozenset({"0", "off", "f", "false", "n", "no"})
#: An integer's sign and its digits. pydantic takes no more than this: any number of zeros, any of Unicode's spaces.
_INTEGER: Final = re.compile(r"\s*([+-]?)([0-9_]+)(?:\.0*)?\s*")
#: So many digits are more than ``MOST``.
_MANY_DIGITS: Final = 11


def truth_of(value: object) -> bool | None:
    """Return the truth that vLLM reads in ``value``, ``None`` if it refuses the request for it.

    JSON's ``null`` is false: so are the defaults of all fields this is for.
    """
    if value is None:
        return False
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else None
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def count_of(value: object) -> int | None:
    """Return the count that vLLM reads in ``value``, from 0 to ``MOST``; ``None`` if there is none to be read.

    A negative one, for which vLLM refuses the request, is 0.
    """
    if value is None or (type(value) is int and 0 <= value <= MOST):  # nearly all
        return value
    if isinstance(value, str):
        match = _INTEGER.fullmatch(value)
        value = None if match is None else _integer(match[1], match[2])
    if isinstance(value, float) and value.is_integer():
        return int(min(max(value, 0), MOST))
    return min(max(int(value), 0), MOST) if isinstance(value, int) else None


def _integer(sign: str, digits: str) -> int:
    return int(sign + (digits.replace("_", "").lstrip("0")[:_MANY_DIGITS] or "0"))
