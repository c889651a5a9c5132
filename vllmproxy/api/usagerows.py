"""The rows of ``GET /usage``, as JSON and as CSV. Pure."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from attrs import astuple

from vllmproxy.usage.ledger import NOTHING, added, sum_of
from vllmproxy.usage.prices import currency
from vllmproxy.usage.sums import UsageSum

#: What a spreadsheet takes for the beginning of a formula.
_FORMULA: Final = ("=", "+", "-", "@")

#: The aliases of those of the keys that still exist.
Aliases = Mapping[str, str | None]


def json_row(group_by: Sequence[str], each: UsageSum, aliases: Aliases) -> dict[str, Any]:
    """Return the row of one sum."""
    names: dict[str, str | None] = {}
    for name, value in zip(group_by, each.group, strict=True):
        names[name] = value
        if name == "key" and value in aliases:
            names["key_alias"] = aliases[value]
    return {**names, **_counts(each), "audio_seconds": each.audio_ms / 1000, "spend": currency(each.spend)}


def total_of(sums: Iterable[UsageSum]) -> UsageSum:
    """Return the sum of all of ``sums``."""
    numbers = NOTHING
    for each in sums:
        numbers = added(numbers, astuple(each)[1:])
    return sum_of((), numbers)


def csv_head(group_by: Sequence[str]) -> str:
    """Return the line with the names of the columns."""
    columns = [name for group in group_by for name in ((group, "key_alias") if group == "key" else (group,))]
    return _line([*columns, *_counts(UsageSum()), "audio_seconds", "spend"])


def csv_row(group_by: Sequence[str], each: UsageSum, aliases: Aliases) -> str:
    """Return the line of one sum; none of its texts is one that a spreadsheet runs as a formula."""
    texts: list[str] = []
    for name, value in zip(group_by, each.group, strict=True):
        texts += [value, aliases.get(value) or ""] if name == "key" else [value]
    numbers = [*map(str, _counts(each).values()), _decimal(each.audio_ms, 3), _decimal(each.spend, 6)]
    return _line([*map(_harmless, texts), *numbers])


def _counts(each: UsageSum) -> dict[str, int]:
    return {
        "requests": each.requests,
        "estimated_requests": each.estimated,
        "unknown_requests": each.unknown,
        "prompt_tokens": each.prompt_tokens,
        "completion_tokens": each.completion_tokens,
        "total_tokens": each.prompt_tokens + each.completion_tokens,
        "cached_prompt_tokens": each.cached_tokens,
    }


def _harmless(text: str) -> str:
    """Return ``text`` as neither a spreadsheet nor a terminal does anything about it."""
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def _decimal(number: int, places: int) -> str:
    return f"{Decimal(number).scaleb(-places):f}"


def _line(values: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()
