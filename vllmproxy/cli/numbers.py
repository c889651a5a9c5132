"""Numbers on the command line."""

import argparse
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def number(text: str, kind: type[N], wanted: str, fits: Callable[[N], bool] = lambda _: True) -> N:
    """Return the number that ``text`` is.

    :param wanted: what to write, with an example.
    :raises argparse.ArgumentTypeError: it is none, or does not fit.
    """
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def whole(text: str) -> int:
    """Return the whole number that ``text`` is."""
    return number(text, int, "a whole number, like 100")
