"""``vllmproxy usage``: the sums that ``GET /usage`` answers."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from vllmproxy.cli.client import Client
from vllmproxy.cli.names import KeyName, parse_name
from vllmproxy.cli.output import write, write_file, write_json
from vllmproxy.cli.tables import Column, table
from vllmproxy.cli.text import field_text, money, plain, whole_number

Sum = dict[str, Any]

_TITLES: Final = {"day": "DAY (UTC)", "key": "KEY", "model": "MODEL", "end_user": "END USER"}
#: Title, field, and rank: the highest is left out first.
_NUMBERS: Final = (
    ("REQUESTS", "requests", 0),
    ("PROMPT", "prompt_tokens", 0),
    ("CACHED", "cached_prompt_tokens", 2),
    ("COMPLETION", "completion_tokens", 0),
    ("TOTAL", "total_tokens", 1),
    ("AUDIO S", "audio_seconds", 3),
    ("SPEND", "spend", 0),
)
#: Those of which there is nothing in most tables.
_SELDOM: Final = frozenset({"cached_prompt_tokens", "audio_seconds", "spend"})


def show_usage(client: Client, options: Namespace) -> int:
    """Show the sums."""
    query = _query(options, datetime.now(UTC).date())
    if options.csv:
        write_file(client.get_csv("/usage", {**query, "format": "csv"}))
        return 0
    answer = client.get("/usage", query)
    sums, total = answer.get("usage"), answer.get("total")
    if not isinstance(sums, list) or not all(isinstance(each, dict) for each in sums) or not isinstance(total, dict):
        raise client.misunderstood()
    if options.json:
        write_json(answer)
    elif sums:
        write(f"Usage {_span(answer)}\n\n{_table(sums, total, options.by, wide=options.wide)}{_remarks(total)}")
    else:
        write(f"No usage {_span(answer)}.\n")
    return 0


def _query(options: Namespace, today: date) -> dict[str, str | None]:
    since = options.since if options.days is None else (today - timedelta(days=options.days - 1)).isoformat()
    until = options.until if options.days is None else today.isoformat()
    name = None if options.key is None else _name(options.key)
    return {
        "since": since,
        "until": until,
        "key": None if name is None else name.token,
        "key_alias": None if name is None else name.alias,
        "model": options.model,
        "end_user": options.end_user,
        "group_by": ",".join(options.by),
    }


def _name(text: str) -> KeyName:
    """Return whose usage is meant: a key's, or the master key's, which has no other name."""
    return KeyName("master", token="master") if text == "master" else parse_name(text)


def _span(answer: Sum) -> str:
    return f"from {field_text('since', answer.get('since'))} to {field_text('until', answer.get('until'))} (UTC)"


def _table(sums: Sequence[Sum], total: Sum, groups: Sequence[str], *, wide: bool) -> str:
    columns = [
        Column(
            title=_TITLES[group],
            cells=[_group(each, group, wide=wide) for each in sums],
            folds=group != "day",
            total="" if position else "Total",
        )
        for position, group in enumerate(groups)
    ]
    for title, name, rank in _NUMBERS:
        show = _shower(name)
        if total.get(name) or name not in _SELDOM:
            cells = [show(each.get(name)) for each in sums]
            columns.append(Column(title=title, cells=cells, number=True, rank=rank, total=show(total.get(name))))
    return table(columns, wide=wide)


def _shower(name: str) -> Callable[[Any], str]:
    if name == "spend":
        return money
    return _seconds if name == "audio_seconds" else whole_number


def _seconds(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, int | float) else whole_number(value)


def _group(each: Sum, group: str, *, wide: bool) -> str:
    """Return what a sum is of; a dash where nobody said. Of a key that is no more there is the hash, ``wide`` whole, as
    ``--key`` takes it."""
    alias, value = each.get("key_alias"), each.get(group)
    if group != "key":
        return field_text(group, value) or "-"
    if isinstance(alias, str) and alias:
        return plain(alias)
    text = field_text("key", value)
    return f"{text[:16]}..." if len(text) == 64 and not wide else text or "-"


def _remarks(total: Sum) -> str:
    """Return what has to be known about the numbers."""
    estimated, unknown = total.get("estimated_requests"), total.get("unknown_requests")
    said = []
    if estimated:
        said.append(f"Requests whose tokens are estimated: {whole_number(estimated)}.\n")
    if unknown:
        said.append(f"Requests that used what nobody could read, and is not in the sums: {whole_number(unknown)}.\n")
    return "".join(["\n", *said]) if said else ""
