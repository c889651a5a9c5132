"""What somebody may have meant by a name that there is not. Pure."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of ``known`` that ``name`` looks like, or else is the first words of, whatever its letters' case,
    dashes or underscores; ``None`` where it is none, or the first words of several."""
    plain = {_plain(each): each for each in known}
    wanted = _plain(name[:64])
    found = difflib.get_close_matches(wanted, plain, n=1) or [each for each in plain if each.startswith(f"{wanted}-")]
    return plain[found[0]] if len(found) == 1 else None


def question(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean …?`` to be put behind a sentence; empty where nobody can tell."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
