"""Values as pydantic's lax mode takes them, which vLLM's request models are read in (checked with vLLM 0.32)."""

from typing import Final

#: The largest count that is handed on. More is as good as no bound, and sums of this stay exact in a double.
MOST: Final = 1 << 31

_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_FALSE: Final = frozenset({"0", "off", "f", "false", "n", "no"})
_LONGEST_WORD: Final = max(map(len, _TRUE | _FALSE))
#: So many digits are more than ``MOST``.
_MANY_DIGITS: Final = 11


def truth_of(value: object) -> bool | None:
    """Return the truth that vLLM reads in ``value``, ``None`` if it refuses the request for it.

    JSON's ``null`` is false: so are the defaults of all fields this is for.
    """
    if value is None:
        return False
    if isinstance(value, str):
        word = value.lower() if len(value) <= _LONGEST_WORD else ""
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
        value = _integer_in(value)
    if isinstance(value, float) and value.is_integer():
        return int(min(max(value, 0), MOST))
    return min(max(int(value), 0), MOST) if isinstance(value, int) else None


def _integer_in(text: str) -> int | None:
    """Return an integer as pydantic reads one in a text, in few steps however long that is: a sign, digits with any
    number of zeros and underscores, a fraction of zeros, and any of Unicode's spaces around them."""
    text = text.strip()
    whole, _, fraction = text.removeprefix("-" if text.startswith("-") else "+").partition(".")
    digits = whole.replace("_", "") or whole[:1].replace("_", "0")
    if fraction.strip("0") or not (digits.isascii() and digits.isdigit()):
        return None
    number = int(digits.lstrip("0")[:_MANY_DIGITS] or "0")
    return -number if text.startswith("-") else number
