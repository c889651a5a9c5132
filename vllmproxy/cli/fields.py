"""The options that set fields of a key, and the bodies made of them. One table serves ``create`` and ``update``."""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, Final

from attrs import frozen

from vllmproxy.cli.numbers import number, whole

#: The kinds of keys; named in the help, judged by the proxy.
_TYPES: Final = "default, llm_api, read_only or management"


@frozen(kw_only=True)
class FieldOption:
    """One option.

    :ivar option: its name on the command line.
    :ivar field: the API's name.
    :ivar kind: makes a value of its text, or raises :class:`argparse.ArgumentTypeError`.
    :ivar many: it may be given more than once; ``list`` or ``dict`` says what the values are put together to.
    """

    option: str
    field: str
    metavar: str
    help: str
    kind: Callable[[str], Any] = str
    many: type[list[Any]] | type[dict[str, Any]] | None = None


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; update --clear FIELD takes a value away")
    return text


def _commas(text: str) -> list[str]:
    return [_filled(each.strip()) for each in text.split(",")]


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _counted(text: str) -> tuple[str, int]:
    name, value = _pair(text)
    return name, whole(value)


def _amount(text: str) -> float:
    return number(text, float, "an amount of money, like 12.5", math.isfinite)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('it is not a JSON object, like \'{"project": "blue"}\'')
    return value


FIELDS: Final = (
    FieldOption(option="--alias", field="key_alias", metavar="NAME", kind=_filled, help="what people call the key"),
    FieldOption(
        option="--models", field="models", metavar="A,B", kind=_commas, many=list, help="the models that it may use"
    ),
    FieldOption(
        option="--alias-model",
        field="aliases",
        metavar="NAME=MODEL",
        kind=_pair,
        many=dict,
        help="a name under which the key uses a model; repeatable",
    ),
    FieldOption(
        option="--route",
        field="allowed_routes",
        metavar="ROUTE",
        kind=_commas,
        many=list,
        help="a path (/v1/chat, /v1/*) or a group (inference, info, admin) that it may call; repeatable",
    ),
    FieldOption(option="--type", field="key_type", metavar="TYPE", kind=_filled, help=_TYPES),
    FieldOption(
        option="--duration",
        field="duration",
        metavar="TIME",
        kind=_filled,
        help="how long it works from now on: 30m, 12h, 30d; without end otherwise",
    ),
    FieldOption(option="--rpm", field="rpm_limit", metavar="N", kind=whole, help="requests a minute"),
    FieldOption(option="--tpm", field="tpm_limit", metavar="N", kind=whole, help="tokens a minute"),
    FieldOption(
        option="--parallel", field="max_parallel_requests", metavar="N", kind=whole, help="requests at the same time"
    ),
    FieldOption(
        option="--model-rpm",
        field="model_rpm_limit",
        metavar="MODEL=N",
        kind=_counted,
        many=dict,
        help="requests a minute to a model; repeatable",
    ),
    FieldOption(
        option="--model-tpm",
        field="model_tpm_limit",
        metavar="MODEL=N",
        kind=_counted,
        many=dict,
        help="tokens a minute of a model; repeatable",
    ),
    FieldOption(
        option="--max-budget", field="max_budget", metavar="AMOUNT", kind=_amount, help="what it may spend in a period"
    ),
    FieldOption(
        option="--max-budget-tokens",
        field="max_budget_tokens",
        metavar="N",
        kind=whole,
        help="tokens that it may use in a period",
    ),
    FieldOption(
        option="--budget-duration",
        field="budget_duration",
        metavar="TIME",
        kind=_filled,
        help="the period after which its spending begins anew: 30d",
    ),
    FieldOption(
        option="--soft-budget",
        field="soft_budget",
        metavar="AMOUNT",
        kind=_amount,
        help="what it may spend before somebody is warned",
    ),
    FieldOption(option="--user", field="user_id", metavar="ID", kind=_filled, help="whose it is"),
    FieldOption(option="--team", field="team_id", metavar="ID", kind=_filled, help="whose team's it is"),
    FieldOption(option="--tag", field="tags", metavar="TAG", kind=_commas, many=list, help="a tag; repeatable"),
    FieldOption(
        option="--metadata", field="metadata", metavar="JSON", kind=_object, help="an object to keep with the key"
    ),
)

#: What ``update --clear`` takes.
CLEARABLE: Final = tuple(sorted(each.field for each in FIELDS))


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Add the options to ``parser``, in a group of their own."""
    group = parser.add_argument_group("fields of the key")
    for each in FIELDS:
        action = "append" if each.many else "store"
        group.add_argument(
            each.option, dest=each.field, type=each.kind, action=action, metavar=each.metavar, help=each.help
        )


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that are given, in the API's names, for a JSON body."""
    fields = {}
    for each in FIELDS:
        value = getattr(options, each.field)
        if value is not None:
            fields[each.field] = _together(value, each.many)
    return fields


def _together(value: Any, many: type[Any] | None) -> Any:
    if many is list:
        return list(dict.fromkeys(item for items in value for item in items))
    return dict(value) if many is dict else value
