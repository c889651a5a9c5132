"""``vllmproxy keys``: each command is the calls it makes and what it shows of their answers."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from vllmproxy.cli.client import Client
from vllmproxy.cli.errors import CommandError
from vllmproxy.cli.fields import fields_of
from vllmproxy.cli.keytable import key_table
from vllmproxy.cli.names import KeyName, parse_name
from vllmproxy.cli.output import write, write_json
from vllmproxy.cli.place import read_key
from vllmproxy.cli.tables import pairs
from vllmproxy.cli.text import complain, field_text, plain, status_of

Row = dict[str, Any]
_PAGE: Final = "100"


def create(client: Client, options: Namespace) -> int:
    """Make a key."""
    body = fields_of(options) | ({"blocked": True} if options.blocked else {}) | _custom_key(options, "key")
    return _show_new(client, client.post("/key/generate", body), options)


def rotate(client: Client, options: Namespace) -> int:
    """Put a new key in the place of one."""
    old = _token(client, parse_name(options.name))
    body: Row = {"key": old, **_custom_key(options, "new_key")}
    if options.grace:
        body["grace_period"] = options.grace
    status = _show_new(client, client.post("/key/regenerate", body), options)
    if options.grace and not options.json and not options.quiet:
        write(f"\nThe old key{_works_until(client, old)}. What ends it before:\n  vllmproxy keys delete {old}\n")
    return status


def list_keys(client: Client, options: Namespace) -> int:
    """List keys, all pages of them."""
    query = {
        "status": options.status,
        "key_alias": options.alias,
        "user_id": options.user,
        "team_id": options.team,
        "search": options.search,
        "sort_by": options.sort,
        "sort_order": options.order,
    }
    # A key that is made meanwhile moves the others on to the next page, where they come again.
    rows = list({row.get("token"): row for row in _rows(client, query)}.values())
    if options.json:
        write_json({"keys": rows, "total_count": len(rows)})
    elif rows:
        write(key_table(rows, datetime.now(UTC), wide=options.wide))
    else:
        write("No keys match.\n" if any(query.values()) else "There are no keys.\n")
    return 0


def show(client: Client, options: Namespace) -> int:
    """Show a key."""
    name = parse_name(options.name)
    return _show_row(_find(client, name) if name.token is None else _info(client, name.token), options)


def update(client: Client, options: Namespace) -> int:
    """Change a key."""
    cleared = dict.fromkeys(options.clear)
    body = {"key": _token(client, parse_name(options.name)), **fields_of(options), **cleared}
    row = client.post("/key/update", body)
    return _show_row({name: value for name, value in row.items() if name != "key"}, options)


def block(client: Client, options: Namespace, *, blocked: bool) -> int:
    """Block a key, or let it work again."""
    name = parse_name(options.name)
    row = client.post("/key/block" if blocked else "/key/unblock", {"key": _token(client, name)})
    if options.json:
        write_json(row)
    else:
        write(f"{plain(name.shown)} is {'blocked' if blocked else 'no longer blocked'}.\n")
    return 0


def delete(client: Client, options: Namespace) -> int:
    """Delete keys."""
    names = [parse_name(text) for text in dict.fromkeys(options.names)]
    if not options.yes and not _agreed(names):
        raise CommandError("Nothing was deleted.")
    body = {
        "keys": [name.token for name in names if name.token is not None],
        "key_aliases": [name.alias for name in names if name.alias is not None],
    }
    answer = client.post("/key/delete", {field: values for field, values in body.items() if values})
    gone = answer.get("deleted_keys")
    if not isinstance(gone, list):
        raise client.misunderstood()
    missing = [name.shown for name in names if (name.token or name.alias) not in gone]
    if options.json:
        write_json(answer)
    else:
        write("".join(f"{plain(name.shown)} is deleted.\n" for name in names if name.shown not in missing))
    if missing:
        complain(f"There is no key {', '.join(missing)}.")
    return 1 if missing else 0


COMMANDS: Final[dict[str, Callable[[Client, Namespace], int]]] = {
    "keys create": create,
    "keys list": list_keys,
    "keys show": show,
    "keys update": update,
    "keys block": partial(block, blocked=True),
    "keys unblock": partial(block, blocked=False),
    "keys delete": delete,
    "keys rotate": rotate,
}


def _custom_key(options: Namespace, field: str) -> Row:
    if options.custom_key_file is None:
        return {}
    return {field: read_key(Path(options.custom_key_file), "--custom-key-file")}


def _rows(client: Client, query: Mapping[str, str | None]) -> Iterator[Row]:
    """Ask for one page after the other until all are there, or one is empty."""
    page, pages = 1, 1
    while page <= pages:
        asked = {**query, "page": str(page), "size": _PAGE, "return_full_object": "true"}
        answer = client.get("/key/list", asked)
        rows: Any = answer.get("keys")
        pages = answer.get("total_pages", 0)
        if not isinstance(pages, int) or not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise client.misunderstood()
        yield from rows
        if not rows:
            return
        page += 1


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("token"), str)


def _info(client: Client, token: str) -> Row:
    """Return the row of the key with that hash. Raises :class:`CommandError`."""
    info = client.get("/key/info", {"key": token}).get("info")
    if not isinstance(info, dict):
        raise client.misunderstood()
    return {"token": token, **info}


def _works_until(client: Client, token: str) -> str:
    """Return which key that is and when it ends; as much as can be had, for another one has been shown already."""
    try:
        row = _info(client, token)
    except CommandError:
        return " goes on working for the time of --grace"
    return f", {plain(str(row.get('key_name')))}, works until {field_text('expires', row.get('expires'))}"


def _find(client: Client, name: KeyName) -> Row:
    """Return the row of the key that an alias names. Raises :class:`CommandError`."""
    for row in _rows(client, {"key_alias": name.alias}):
        if row.get("key_alias") == name.alias:
            return row
    raise CommandError(f"There is no key with the alias {name.shown}; 'vllmproxy keys list' shows those there are.")


def _token(client: Client, name: KeyName) -> str:
    """Return the hash of the key that is named; one that is named by it may not exist."""
    token: str = _find(client, name)["token"] if name.token is None else name.token
    return token


def _show_new(client: Client, answer: Row, options: Namespace) -> int:
    key = answer.get("key")
    if not isinstance(key, str):
        raise client.misunderstood()
    if options.json:
        write_json(answer)
    elif options.quiet:
        write(f"{plain(key)}\n")
    else:
        row = {name: value for name, value in answer.items() if name not in ("key", "token_id", "duration")}
        write(f"{plain(key)}\n\nThis is the only time the key is shown.\n\n{pairs(_with_status(row))}")
    return 0


def _show_row(row: Row, options: Namespace) -> int:
    if options.json:
        write_json(row)
    else:
        write(pairs(_with_status(row)))
    return 0


def _with_status(row: Row) -> Row:
    """Return ``row`` with what the key is first: what it is called, and whether it works."""
    first = {name: row.get(name) for name in ("key_alias", "key_name", "token")}
    return {**first, "status": status_of(row, datetime.now(UTC)), **{n: row[n] for n in row if n not in first}}


def _agreed(names: Sequence[KeyName]) -> bool:
    """Ask whether to delete, if there is a person to ask."""
    if not sys.stdin.isatty():
        return True
    what = plain(", ".join(name.shown for name in names))
    print(f"Delete {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
