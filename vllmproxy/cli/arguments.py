"""What may be said on the command line. Nothing here asks the proxy anything."""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Final, NoReturn

from vllmproxy.build import VERSION
from vllmproxy.cli.fields import CLEARABLE, add_fields, fields_of
from vllmproxy.cli.numbers import number
from vllmproxy.cli.place import DEFAULT_URL, KEY_VARIABLES, URL_VARIABLE
from vllmproxy.cli.text import plain, without_keys

_NAME: Final = "the key's alias or hash, or - for a key on standard input"
_GROUPS: Final = ("day", "key", "model", "end-user")
_LONGEST: Final = 86_400.0
_MOST_DAYS: Final = 36_525

Parsers = Any  # argparse's type for subparsers has no public name


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and repeats no key when it complains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        super().error(without_keys(plain(message)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ``command`` says which command it is (``keys create``, ``usage``).

    :raises SystemExit: the help was shown (0), or the arguments are wrong (2) and that was said.
    """
    parser = _parser()
    if any(not _is_text(each) for each in arguments):
        parser.error("the arguments are not text in the terminal's encoding")
    options = parser.parse_args(arguments)
    if options.command == "keys update":
        _check_update(options)
    if options.command == "usage":
        _check_usage(options)
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="vllmproxy",
        description="Manages the virtual keys of a running vllmproxy and shows what they used.",
        epilog="Exit status: 0; 1: it failed; 2: wrong arguments. 'vllmproxy COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"vllmproxy {VERSION}")
    _add_place(parser, lambda default: default)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    keys = commands.add_parser("keys", help="make, show and change virtual keys", description="Virtual keys.")
    _add_keys(keys.add_subparsers(metavar="COMMAND", required=True))
    _add_usage(commands)
    return parser


def _add_place(parser: argparse.ArgumentParser, default: Callable[[Any], Any]) -> None:
    """Add where the proxy is: to each command, and to the whole, where it has the defaults."""
    group = parser.add_argument_group("the proxy")
    group.add_argument(
        "--url", default=default(None), help=f"http://, https:// or unix:/path ({URL_VARIABLE}; {DEFAULT_URL})"
    )
    group.add_argument(
        "--key-file",
        metavar="FILE",
        default=default(None),
        help=f"the master key, or a key of the type management ({', '.join(KEY_VARIABLES)}: the key itself)",
    )
    group.add_argument(
        "--ca", metavar="FILE", default=default(None), help="authorities to trust (PEM) instead of the system's"
    )
    group.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=default(30.0), help="for each call; 30")


def _command(parsers: Parsers, group: str, name: str, help: str, *, json: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    _add_place(parser, lambda default: argparse.SUPPRESS)
    parser.set_defaults(command=f"{group} {name}".strip())
    parser.add_argument("--json", action="store_true", help=json)
    return parser


def _add_keys(parsers: Parsers) -> None:
    create = _command(parsers, "keys", "create", "make a key and show it, this once", json="print the API's answer")
    _add_new_key(create)
    create.add_argument("--blocked", action="store_true", help="it does not work until it is unblocked")
    add_fields(create)
    _add_list(parsers)
    show = _command(parsers, "keys", "show", "show all about a key", json="print the row")
    update = _command(parsers, "keys", "update", "change a key; what is not named stays", json="print the row")
    block = _command(parsers, "keys", "block", "stop a key from working", json="print the row")
    unblock = _command(parsers, "keys", "unblock", "let a blocked key work again", json="print the row")
    rotate = _command(parsers, "keys", "rotate", "put a new key in a key's place", json="print the API's answer")
    for parser in (show, update, block, unblock, rotate):
        parser.add_argument("name", metavar="NAME", help=_NAME)
    add_fields(update)
    update.add_argument(
        "--clear",
        metavar="FIELD",
        action="append",
        default=[],
        choices=CLEARABLE,
        help=f"take a value away; repeatable: {', '.join(CLEARABLE)}",
    )
    _add_new_key(rotate)
    rotate.add_argument(
        "--grace", metavar="TIME", help="how long the old key goes on working: 1h; not at all otherwise"
    )
    delete = _command(parsers, "keys", "delete", "end keys for good", json="print the API's answer")
    delete.add_argument("names", metavar="NAME", nargs="+", help=_NAME)
    delete.add_argument("--yes", action="store_true", help="do not ask, which is done on a terminal only")


def _add_new_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print the key and nothing else")
    parser.add_argument(
        "--custom-key-file", metavar="FILE", help="a key of your own making (sk-, 16 characters or more)"
    )


def _add_list(parsers: Parsers) -> None:
    parser = _command(parsers, "keys", "list", "list keys, newest first", json="print the rows")
    parser.add_argument("--status", choices=("active", "blocked", "expired"))
    parser.add_argument("--alias", metavar="NAME", help="exactly this one")
    parser.add_argument("--user", metavar="ID", help="of this user")
    parser.add_argument("--team", metavar="ID", help="of this team")
    parser.add_argument("--search", metavar="TEXT", help="text in the alias, the name, the user or the team")
    parser.add_argument("--sort", metavar="FIELD", help="by another field than created_at: key_alias, expires, ...")
    parser.add_argument("--order", choices=("asc", "desc"), help="desc")
    parser.add_argument("--wide", action="store_true", help="all columns, however wide the terminal is")


def _add_usage(parsers: Parsers) -> None:
    parser = _command(parsers, "", "usage", "show what was used, day by day (UTC)", json="print the API's answer")
    parser.add_argument("--since", metavar="DAY", type=_day, help="the first day: 2026-11-01")
    parser.add_argument("--until", metavar="DAY", type=_day, help="the last day")
    parser.add_argument("--days", metavar="N", type=_count, help="the last N days, instead of --since and --until")
    parser.add_argument("--key", metavar="NAME", help=f"of one key: {_NAME}")
    parser.add_argument("--model", help="of one model")
    parser.add_argument("--end-user", metavar="ID", help="of one end user")
    parser.add_argument(
        "--by", metavar="A,B", type=_groups, default=["day"], help=f"a line for each of {', '.join(_GROUPS)}; day"
    )
    parser.add_argument("--csv", action="store_true", help="print comma-separated values")
    parser.add_argument("--wide", action="store_true", help="all columns, however wide the terminal is")


def _check_update(options: argparse.Namespace) -> None:
    given = fields_of(options)
    both = sorted(set(given) & set(options.clear))
    if both:
        _wrong(f"{both[0]} is both given and cleared")
    if not given and not options.clear:
        _wrong("nothing to change: name a field, or --clear one")


def _check_usage(options: argparse.Namespace) -> None:
    if options.days is not None and (options.since or options.until):
        _wrong("--days is instead of --since and --until")
    if options.csv and options.json:
        _wrong("--csv and --json are two formats; choose one")


def _wrong(message: str) -> NoReturn:
    print(f"vllmproxy: error: {message}", file=sys.stderr)
    sys.exit(2)


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds(text: str) -> float:
    return number(
        text, float, "a number of seconds, more than 0 and at most a day, like 30", lambda value: 0 < value <= _LONGEST
    )


def _count(text: str) -> int:
    return number(text, int, f"a number of days, 1 to {_MOST_DAYS}, like 7", lambda value: 1 <= value <= _MOST_DAYS)


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write it like 2026-11-01") from None


def _groups(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) < len(names) or not set(names) <= set(_GROUPS):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {', '.join(_GROUPS)}, each once")
    return [name.replace("-", "_") for name in names]
