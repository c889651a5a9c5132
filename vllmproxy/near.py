"""What somebody may have meant by a name that there is not. Pure."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of ``known`` that ``name`` looks like, whatever its letters' case, dashes or underscores; ``None``
    where it looks like none."""
    plain = {_plain(each): each for each in known}
    found = difflib.get_close_matches(_plain(name[:64]), plain, n=1)
    return plain[found[0]] if found else None


def question(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean …?`` to be put behind a sentence; empty where nobody can tell."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
