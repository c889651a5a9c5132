"""Values as text that a terminal may be shown."""

import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

#: What may be a key: never repeated in an error, whoever wrote it.
_KEYS: Final = re.compile(r"sk-[\x21-\x7e]{13,}")
#: The fields of a row that are times.
_TIMES: Final = frozenset({"expires", "created_at", "updated_at", "budget_reset_at", "last_active"})


def plain(text: str) -> str:
    """Return ``text`` with everything that does not print (control characters, escapes, bidirectional marks, line
    ends) written as ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def complain(message: str) -> None:
    """Say ``message`` on standard error."""
    print(f"vllmproxy: {without_keys(plain(message))}", file=sys.stderr)


def without_keys(text: str) -> str:
    """Return ``text`` with what may be a key taken out."""
    return _KEYS.sub("sk-...", text)


def whole_number(value: Any) -> str:
    """Return a number with its thousands apart, empty for none."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else plain(str(value))


def money(value: Any) -> str:
    """Return an amount with four places, empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(str(value))
    return "<0.0001" if 0 < value < 0.0001 else f"{value:,.4f}"


def moment(value: Any, timespec: str = "minutes") -> str:
    """Return an ISO time in UTC, ``2026-11-26 05:21``; as it is where it is none."""
    time = time_of(value)
    if time is None:
        return "" if value is None else plain(str(value))
    return time.replace(tzinfo=None).isoformat(sep=" ", timespec=timespec)


def time_of(value: Any) -> datetime | None:
    """Return the time in UTC that ISO text is, ``None`` where it is none."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def field_text(name: str, value: Any) -> str:
    """Return the value of a row's field, empty where the field is not set. Zero is a value."""
    if value is None or value is False or value in ("", [], {}):
        return ""
    if name in _TIMES:
        return f"{moment(value, 'seconds')} UTC" if time_of(value) else plain(str(value))
    if isinstance(value, float):
        return money(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return plain(", ".join(value))
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def status_of(row: Mapping[str, Any], now: datetime) -> str:
    """Return what a key is at ``now``: ``active``, ``blocked`` or ``expired``; blocked counts before expired."""
    if row.get("blocked"):
        return "blocked"
    expires = time_of(row.get("expires"))
    return "expired" if expires is not None and now >= expires else "active"
