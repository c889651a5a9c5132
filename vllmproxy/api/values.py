"""Single values in the bodies of the key API: of the right type and within bounds, or a refusal that says why. Pure."""

import json
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, Final

from vllmproxy.errors import BadRequest
from vllmproxy.keys.durations import seconds_of
from vllmproxy.keys.policy import KEY_TYPES, ROUTE_GROUPS, parse_route
from vllmproxy.limits.values import MAX_AMOUNT
from vllmproxy.near import question
from vllmproxy.usage.prices import MICRO, micros_of

MINIMUM_CUSTOM_KEY: Final = 16
_MAXIMUM_TEXT: Final = 255
#: Bytes: every change of a key writes it twice into the audit trail.
_MAXIMUM_METADATA: Final = 16_384
_MAXIMUM_ROUTES: Final = 128
_MAXIMUM_MODELS: Final = 128
#: LiteLLM's words for models that depend on what this proxy does not have: teams.
_NO_MODELS: Final = frozenset({"all-team-models", "no-default-models"})
_CUSTOM_KEY: Final = re.compile(r"sk-[\x21-\x7e]{13,252}")


def parse_duration(body: Mapping[str, Any], name: str, now: float) -> int | None:
    """Return the seconds of a duration, ``None`` for one without end. Raises :class:`BadRequest`."""
    try:
        return seconds_of(typed(body, name, str, "a string"), now)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.", param=name) from None


def refuse_unknown(names: Iterable[str], known: Set[str]) -> None:
    """Raise :class:`BadRequest` for the name of a field that is not in ``known``."""
    for name in names:
        if name not in known:
            # The name is the caller's own text: cut, so that an answer stays a sentence.
            raise BadRequest(f"Unknown field {name[:64]!r}.{question(name, known)}", param=name[:64])


def typed(body: Mapping[str, Any], name: str, kind: type, description: str) -> Any:
    """Return a field that is of ``kind``, or is not there, or is null. Raises :class:`BadRequest`."""
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise BadRequest(f"{name} must be {description}.", param=name)
    return value


def text(body: Mapping[str, Any], name: str) -> str | None:
    """Return a text, ``None`` where it is not there or empty. Raises :class:`BadRequest`."""
    value = typed(body, name, str, "a string")
    return _checked(value, name) if value else None


def texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts, each once. Raises :class:`BadRequest`."""
    values = typed(body, name, list, "a list of strings") or []
    if not all(isinstance(value, str) and value for value in values):
        raise BadRequest(f"{name} must be a list of strings, none of them empty.", param=name)
    return tuple(dict.fromkeys(_checked(value, name) for value in values))


def _checked(value: str, name: str) -> str:
    if len(value) > _MAXIMUM_TEXT or not value.isprintable():
        raise BadRequest(f"{name} must be at most {_MAXIMUM_TEXT} characters without control characters.", param=name)
    return value


def metadata(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value: dict[str, Any] = typed(body, name, dict, "an object") or {}
    if len(json.dumps(value)) > _MAXIMUM_METADATA:
        raise BadRequest(f"{name} must be at most {_MAXIMUM_METADATA} bytes of JSON.", param=name)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    return typed(body, name, bool, "true or false") or False


def limit(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_AMOUNT:
        raise BadRequest(f"{name} must be a whole number from 0 to {MAX_AMOUNT}.", param=name)
    return value


def money(body: Mapping[str, Any], name: str) -> int | None:
    """Return an amount of money in micro-units, ``None`` where it is not there. Raises :class:`BadRequest`."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_AMOUNT / MICRO:
        raise BadRequest(f"{name} must be a number from 0 to {MAX_AMOUNT // MICRO}.", param=name)
    return micros_of(value)


def models(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    names = texts(body, name)
    if len(names) > _MAXIMUM_MODELS:
        raise BadRequest(f"{name} may have {_MAXIMUM_MODELS} entries.", param=name)
    for model in names:
        if model in _NO_MODELS or "*" in model[:-1]:
            raise BadRequest(
                f"{name}: {model[:64]!r} is no model here: name them as vLLM does, with one * at the end for all that "
                "begin so, or leave the field empty for all.",
                param=name,
            )
    return names


def _by_model(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object whose names are models."""
    value: dict[str, Any] = typed(body, name, dict, "an object with models as names") or {}
    if len(value) > _MAXIMUM_MODELS:
        raise BadRequest(f"{name} may have {_MAXIMUM_MODELS} entries.", param=name)
    return {_checked(model, name): each for model, each in value.items() if model}


def aliases(body: Mapping[str, Any], name: str) -> dict[str, str]:
    named = _by_model(body, name)
    for model in named.values():
        if not isinstance(model, str) or not model:
            raise BadRequest(f"{name} must give each alias the name of a model.", param=name)
        _checked(model, name)
    return named


def limit_by_model(body: Mapping[str, Any], name: str) -> dict[str, int]:
    limits = {model: limit({name: each}, name) for model, each in _by_model(body, name).items()}
    return {model: each for model, each in limits.items() if each is not None}


def key_type(body: Mapping[str, Any], name: str) -> str:
    given = text(body, name) or "default"
    if given not in KEY_TYPES:
        raise BadRequest(f"{name} must be one of {', '.join(KEY_TYPES)}.", param=name)
    return given


def routes(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    entries = texts(body, name)
    if len(entries) > _MAXIMUM_ROUTES:
        raise BadRequest(f"{name} may have {_MAXIMUM_ROUTES} entries.", param=name)
    for entry in entries:
        try:
            if entry not in ROUTE_GROUPS:
                parse_route(entry)
        except ValueError as error:
            groups = ", ".join(ROUTE_GROUPS)
            message = f"{name}: {entry[:64]!r} is no path ({error}), and no group either: {groups}."
            raise BadRequest(message, param=name) from None
    return entries


def custom_key(body: Mapping[str, Any], name: str) -> str | None:
    """Return a key of the caller's own making, ``None``: make one. Raises :class:`BadRequest`."""
    key: str | None = typed(body, name, str, "a string") or None
    if key is not None and not _CUSTOM_KEY.fullmatch(key):
        raise BadRequest(
            f"A custom key starts with sk- and has at least {MINIMUM_CUSTOM_KEY} (at most {_MAXIMUM_TEXT}) "
            "characters: letters, digits and signs, no spaces.",
            param=name,
        )
    return key
