"""LiteLLM's durations: ``30s``, ``30m``, ``30h``, ``30d``, ``2w``, ``1mo``. Pure."""

import calendar
import re
from datetime import UTC, datetime
from typing import Final

_FORM: Final = re.compile(r"([0-9]{1,12})(s|mo|m|h|d|w)")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

#: A hundred years: beyond it the writer meant something else, and calendars overflow.
MAXIMUM: Final = 36_525 * 86_400
_MAXIMUM_MONTHS: Final = 1200


def seconds_of(duration: str | None, now: float) -> int | None:
    """Return the seconds that ``duration`` lasts from ``now`` (epoch), ``None`` for one without end.

    ``None`` and ``"-1"`` never end; ``mo`` is calendar months (UTC), the day clipped to the month's last.

    :raises ValueError: with one sentence for the person who wrote it.
    """
    if duration is None or duration == "-1":
        return None
    match = _FORM.fullmatch(duration)
    if match is None:
        raise ValueError('a duration is a number and a unit, s, m, h, d, w or mo: "30s", "12h", "30d"')
    count, unit = int(match[1]), match[2]
    seconds = count * _UNITS[unit] if unit in _UNITS else _months(min(count, _MAXIMUM_MONTHS + 1), now)
    if not 0 < seconds <= MAXIMUM:
        raise ValueError('a duration is between "1s" and a hundred years; leave it out for no end')
    return seconds


def _months(count: int, now: float) -> int:
    begin = datetime.fromtimestamp(now, UTC)
    years, month = divmod(begin.month - 1 + count, 12)
    year = begin.year + years
    day = min(begin.day, calendar.monthrange(year, month + 1)[1])
    return int((begin.replace(year=year, month=month + 1, day=day) - begin).total_seconds())
