"""The query strings of the key API as values. Pure."""

import re
from collections.abc import Set
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from urllib.parse import parse_qs

from attrs import frozen

from vllmproxy.api.fields import token_of
from vllmproxy.errors import BadRequest
from vllmproxy.near import question
from vllmproxy.store.listing import SORT_FIELDS, STATUSES, KeyQuery
from vllmproxy.usage.ledger import KEPT_DAYS
from vllmproxy.usage.sums import GROUPS, GroupBy, UsageQuery

MAXIMUM_SIZE: Final = 100
_MAXIMUM_NUMBER: Final = 10**9

_PAGING: Final = frozenset({"page", "size"})
_LIST: Final = _PAGING | {
    "key_alias",
    "key_hash",
    "return_full_object",
    "search",
    "sort_by",
    "sort_order",
    "status",
    "team_id",
    "user_id",
    # LiteLLM's way to ask for more than one's own keys and for users' rows; here there are none of these.
    "expand",
    "include_created_by_keys",
    "include_team_keys",
}
_ALIASES: Final = _PAGING | {"search"}
#: The id of an audit entry in any of the stores.
_ENTRY: Final = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?")
_AUDIT: Final = frozenset({"before", "limit"})
_USAGE: Final = frozenset({"end_user", "format", "group_by", "model", "since", "until"})
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DEFAULT_DAYS: Final = 30


@frozen
class UsageRequest:
    """What ``GET /usage`` asks for.

    :ivar key_alias: of the key that is meant; ``None`` where ``query`` says which.
    :ivar csv: as CSV, not as JSON.
    """

    query: UsageQuery
    key_alias: str | None
    csv: bool


def query_values(target: bytes, known: Set[str]) -> dict[str, str]:
    """Return the values in the query of ``target``, those that are empty left out.

    :raises BadRequest: one is not in ``known``, or comes twice, or is no text.
    """
    query = target.partition(b"?")[2].decode("latin-1")
    try:
        values = parse_qs(query, max_num_fields=32, errors="strict")
    except ValueError:
        raise BadRequest("The query cannot be read.") from None
    for name, given in values.items():
        if name not in known:
            raise BadRequest(f"Unknown parameter {name[:64]!r}.{question(name, known)}", param=name[:64])
        if len(given) > 1:
            raise BadRequest(f"Give {name} once.", param=name)
    return {name: given[0] for name, given in values.items()}


def parse_list(target: bytes, now: float) -> tuple[KeyQuery, bool]:
    """Return what ``GET /key/list`` asks for, and whether whole rows are wanted. Raises :class:`BadRequest`."""
    values = query_values(target, _LIST)
    key_hash = values.get("key_hash")
    sort_by: Any = _one_of(values, "sort_by", SORT_FIELDS, "created_at")
    status: Any = _one_of(values, "status", STATUSES, None)
    offset, limit = _page(values, default=10)
    query = KeyQuery(
        offset=offset,
        limit=limit,
        sort_by=sort_by,
        descending=_one_of(values, "sort_order", ("asc", "desc"), "desc") == "desc",
        token=None if key_hash is None else token_of(key_hash),
        key_alias=values.get("key_alias"),
        user_id=values.get("user_id"),
        team_id=values.get("team_id"),
        search=values.get("search"),
        status=status,
        now=now,
    )
    return query, _one_of(values, "return_full_object", ("true", "false", "1", "0"), "false") in ("true", "1")


def parse_aliases(target: bytes) -> KeyQuery:
    """Return what ``GET /key/aliases`` asks for. Raises :class:`BadRequest`."""
    values = query_values(target, _ALIASES)
    offset, limit = _page(values, default=50)
    return KeyQuery(
        offset=offset,
        limit=limit,
        search=values.get("search"),
        aliased=True,
        sort_by="key_alias",
        descending=False,
    )


def parse_audit(target: bytes) -> tuple[int, str | None]:
    """Return how many entries ``GET /audit`` asks for, and before which. Raises :class:`BadRequest`."""
    values = query_values(target, _AUDIT)
    before = values.get("before")
    if before is not None and not _ENTRY.fullmatch(before):
        raise BadRequest("before is the next of an earlier answer.", param="before")
    return _number(values, "limit", 50, MAXIMUM_SIZE), before


def parse_usage(target: bytes, now: float, accept: str, key: str | None = None) -> UsageRequest:
    """Return what ``GET /usage`` asks for. Raises :class:`BadRequest`.

    :param now: seconds since the epoch.
    :param accept: the request's Accept.
    :param key: the key that is in the path, itself or its hash; then the query names none.
    """
    values = query_values(target, _USAGE if key is not None else _USAGE | {"key", "key_alias"})
    key, key_alias = values.get("key", key), values.get("key_alias")
    if key is not None and key_alias is not None:
        raise BadRequest("Give key or key_alias, not both.", param="key_alias")
    until = _day(values, "until", datetime.fromtimestamp(now, UTC).date())
    since = _day(values, "since", until - timedelta(days=min(_DEFAULT_DAYS, until.toordinal()) - 1))
    days = (until - since).days + 1
    if days < 1:
        raise BadRequest(f"since ({since}) is after until ({until}).", param="since")
    if days > KEPT_DAYS:
        most = f"ask for at most {KEPT_DAYS}, as many as are kept"
        raise BadRequest(f"From since to until are {days} days; {most}.", param="since")
    query = UsageQuery(
        since=str(since),
        until=str(until),
        # "master" is no virtual key: its use is kept by that name.
        key=key if key in (None, "master") else token_of(key or ""),
        model=values.get("model"),
        end_user=values.get("end_user"),
        group_by=_groups(values),
    )
    preferred = "csv" if "text/csv" in accept.lower() else "json"
    return UsageRequest(query, key_alias, _one_of(values, "format", ("json", "csv"), preferred) == "csv")


def pages_of(query: KeyQuery, total: int) -> dict[str, int]:
    """Return where in the whole listing a page is, in LiteLLM's words."""
    return {
        "total_count": total,
        "current_page": query.offset // query.limit + 1,
        "total_pages": -(-total // query.limit),
    }


def _page(values: dict[str, str], default: int) -> tuple[int, int]:
    size = _number(values, "size", default, MAXIMUM_SIZE)
    return (_number(values, "page", 1, _MAXIMUM_NUMBER) - 1) * size, size


def _day(values: dict[str, str], name: str, default: date) -> date:
    text = values.get(name)
    if text is None:
        return default
    try:
        return date.fromisoformat(text if _DAY.fullmatch(text) else "")
    except ValueError:
        raise BadRequest(f"{name} must be a day (UTC), as in {name}=2026-11-26.", param=name) from None


def _groups(values: dict[str, str]) -> tuple[GroupBy, ...]:
    names = values.get("group_by", "day").split(",")
    known: dict[str, GroupBy] = {name: name for name in GROUPS}
    if len(set(names)) < len(names) or not known.keys() >= set(names):
        raise BadRequest(f"group_by must be some of {','.join(GROUPS)}, each once.", param="group_by")
    return tuple(known[name] for name in names)


def _number(values: dict[str, str], name: str, default: int, maximum: int) -> int:
    text = values.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= maximum):
        raise BadRequest(f"{name} must be a number from 1 to {maximum}.", param=name)
    return int(text)


def _one_of(values: dict[str, str], name: str, choices: tuple[str, ...], default: str | None) -> str | None:
    value = values.get(name, default)
    if value is not None:
        value = value.lower()
        if value not in choices:
            raise BadRequest(f"{name} must be one of {', '.join(choices)}.", param=name)
    return value
