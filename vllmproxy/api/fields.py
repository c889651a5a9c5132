"""The bodies of the key API as values: what may be asked, and what is answered. Pure."""

import json
import re
from collections.abc import Callable, Mapping, Set
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any, Final

from attrs import field, frozen

from vllmproxy.errors import BadRequest
from vllmproxy.keys.budget import Budget
from vllmproxy.keys.durations import seconds_of
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.keys.policy import KEY_TYPES, ROUTE_GROUPS, parse_route
from vllmproxy.limits.values import MAX_AMOUNT
from vllmproxy.usage.prices import currency
from vllmproxy.usage.sums import NO_ACCOUNT, Account

MINIMUM_CUSTOM_KEY: Final = 16
_MAXIMUM_TEXT: Final = 255
#: Bytes: every change of a key writes it twice into the audit trail.
_MAXIMUM_METADATA: Final = 16_384
#: Levels of nesting in a body; Python's own readers and writers of JSON give up, each at another depth.
_DEEPEST: Final = 32
_MAXIMUM_ROUTES: Final = 128
_MAXIMUM_MODELS: Final = 128
#: LiteLLM's words for models that depend on what this proxy does not have: teams.
_NO_MODELS: Final = frozenset({"all-team-models", "no-default-models"})
_CUSTOM_KEY: Final = re.compile(r"sk-[\x21-\x7e]{13,252}")
_TOKEN: Final = re.compile(r"[0-9a-f]{64}")

#: LiteLLM's row fields for restrictions that are not enforced yet, with what it answers where they are not
#: set. Given with any other value they are refused: a limit that is taken and not kept is worse than none.
_NOT_ENFORCED: Final[dict[str, Any]] = {
    "config": {},
    "permissions": {},
    "allowed_cache_controls": [],
    "budget_id": None,
    "model_max_budget": {},
    "guardrails": None,
    "policies": None,
    "prompts": None,
    "enforced_params": None,
    "object_permission": None,
    "organization_id": None,
}

#: The same for fields that LiteLLM takes and does not answer.
_NOT_ENFORCED_NOR_ANSWERED: Final[dict[str, Any]] = {
    "access_group_ids": None,
    "agent_id": None,
    "allowed_passthrough_routes": None,
    "allowed_vector_store_indexes": None,
    "auto_rotate": False,
    "budget_limits": None,
    "project_id": None,
    "rotation_interval": None,
    "router_settings": None,
    "rpm_limit_type": None,
    "send_invite_email": False,
    "tpm_limit_type": None,
}
_UNSUPPORTED: Final = _NOT_ENFORCED | _NOT_ENFORCED_NOR_ANSWERED

_DELETE: Final = frozenset({"keys", "key_aliases"})


@frozen(kw_only=True)
class GenerateKey:
    """What ``POST /key/generate`` asks for.

    :ivar key: a custom key, ``None``: make one.
    :ivar duration: as sent.
    :ivar fields: those of :class:`VirtualKey` that are given.
    :ivar spend: what the key has spent already, in micro-units.
    """

    key: str | None = field(repr=False)
    duration: str | None
    fields: Mapping[str, Any]
    spend: int | None = None


@frozen(kw_only=True)
class DeleteKeys:
    """What ``POST /key/delete`` asks for: keys or their hashes, and aliases, as sent."""

    keys: tuple[str, ...] = field(repr=False)
    aliases: tuple[str, ...]


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``, ``{}`` where that is empty. Raises :class:`BadRequest`."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        # Lone surrogates and numbers too large for a double cannot be stored; this finds them anywhere inside.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    if _is_deep(value):
        raise BadRequest(f"The body is nested more than {_DEEPEST} deep.")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def parse_fields(body: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the fields of :class:`VirtualKey` that ``body`` gives; null is what a field is without being given.

    :param now: what a ``duration`` counts from, seconds since the epoch.
    :raises BadRequest: with the field's name as ``param``.
    """
    refuse_unknown(body, _FIELDS.keys() | _UNSUPPORTED.keys() | {"duration", "budget_duration"})
    for name, unset in _UNSUPPORTED.items():
        if not _is_unset(body.get(name), unset):
            raise BadRequest(f"{name} is not enforced by this version; leave it out.", param=name)
    fields = {name: parse(body, name) for name, parse in _FIELDS.items() if name in body}
    if "duration" in body:
        lasts = parse_duration(body, "duration", now)
        fields["expires"] = None if lasts is None else now + lasts
    if "budget_duration" in body:
        parse_duration(body, "budget_duration", now)
        given = body["budget_duration"]
        fields["budget_duration"] = None if given == "-1" else given
    return fields


def parse_duration(body: Mapping[str, Any], name: str, now: float) -> int | None:
    """Return the seconds of a duration, ``None`` for one without end. Raises :class:`BadRequest`."""
    try:
        return seconds_of(typed(body, name, str, "a string"), now)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}.", param=name) from None


def parse_generate(body: Mapping[str, Any], now: float) -> GenerateKey:
    """Return what ``body`` asks for. Raises :class:`BadRequest` with the field's name as ``param``."""
    unset = [("duration", ""), ("budget_duration", "")]
    given = {name: value for name, value in body.items() if name not in ("key", "spend") and (name, value) not in unset}
    fields = parse_fields(given, now)
    return GenerateKey(
        key=custom_key(body, "key"),
        duration=body.get("duration") or None,
        fields=fields,
        spend=money(body, "spend"),
    )


def parse_delete(body: Mapping[str, Any]) -> DeleteKeys:
    """Return what ``body`` asks for. Raises :class:`BadRequest`."""
    refuse_unknown(body, _DELETE)
    wanted = DeleteKeys(keys=texts(body, "keys"), aliases=texts(body, "key_aliases"))
    if not wanted.keys and not wanted.aliases:
        raise BadRequest("Name the keys to delete: keys (keys or their hashes) or key_aliases.", param="keys")
    return wanted


def new_key(
    wanted: GenerateKey, key: str, now: float, created_by: str | None, *, granted_by_master: bool = False
) -> VirtualKey:
    """Return the row for ``key``, which is made at ``now`` (epoch seconds)."""
    start, reset_at = Budget(start=int(now)).renewed(wanted.fields.get("budget_duration"), now)
    return VirtualKey(
        token=hash_key(key),
        key_name=name_of(key),
        budget_start=start,
        budget_reset_at=reset_at,
        created_at=now,
        updated_at=now,
        created_by=created_by,
        updated_by=created_by,
        granted_by_master=granted_by_master,
        **wanted.fields,
    )


def name_of(key: str) -> str:
    """Return what people recognise ``key`` by."""
    return f"sk-...{key[-4:]}"


def row_of(key: VirtualKey, account: Account = NO_ACCOUNT) -> dict[str, Any]:
    """Return LiteLLM's row for ``key``, without its token; ``account`` is what it has spent."""
    return {
        "key_name": key.key_name,
        "key_alias": key.key_alias,
        "key_type": key.key_type,
        "allowed_routes": list(key.allowed_routes),
        "user_id": key.user_id,
        "team_id": key.team_id,
        "metadata": key.metadata,
        "tags": list(key.tags),
        "blocked": key.blocked,
        "models": list(key.models),
        "aliases": dict(key.aliases),
        "rpm_limit": key.rpm_limit,
        "tpm_limit": key.tpm_limit,
        "model_rpm_limit": dict(key.model_rpm_limit) or None,
        "model_tpm_limit": dict(key.model_tpm_limit) or None,
        "max_parallel_requests": key.max_parallel_requests,
        "max_budget": currency(key.max_budget),
        "soft_budget": currency(key.soft_budget),
        "max_budget_tokens": key.max_budget_tokens,
        "budget_duration": key.budget_duration,
        "budget_reset_at": None if key.budget_reset_at is None else _iso(key.budget_reset_at),
        "expires": None if key.expires is None else _iso(key.expires),
        "created_at": _iso(key.created_at),
        "updated_at": _iso(key.updated_at),
        "created_by": key.created_by,
        "updated_by": key.updated_by,
        **_NOT_ENFORCED,
        "spend": currency(account.spend),
    }


def currency(micros: int | None) -> float | None:
    """Return money as it is answered: the double nearest to it, which shows no more than six decimals."""
    return None if micros is None else micros / 1_000_000


def token_of(key: str) -> str:
    """Return the id of a key that is named by itself or by its sha256 hex."""
    return key if _TOKEN.fullmatch(key) else hash_key(key)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def refuse_unknown(body: Mapping[str, Any], known: Set[str]) -> None:
    """Raise :class:`BadRequest` for a field that is not in ``known``."""
    for name in body:
        if name not in known:
            # The name is the caller's own text: cut, so that an answer stays a sentence.
            raise BadRequest(f"Unknown field {name[:64]!r}.", param=name[:64])


def _is_unset(value: Any, unset: Any) -> bool:
    """Zero is a limit, except where zero is what LiteLLM itself answers; so are True and False."""
    return value is None or value in ("", [], {}) or (unset is not None and value == unset)


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


def _metadata(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value: dict[str, Any] = typed(body, name, dict, "an object") or {}
    if len(json.dumps(value)) > _MAXIMUM_METADATA:
        raise BadRequest(f"{name} must be at most {_MAXIMUM_METADATA} bytes of JSON.", param=name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    return typed(body, name, bool, "true or false") or False


def _limit(body: Mapping[str, Any], name: str) -> int | None:
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_AMOUNT / 1_000_000:
        raise BadRequest(f"{name} must be a number from 0 to {MAX_AMOUNT // 1_000_000}.", param=name)
    return int((Decimal(repr(value)) * 1_000_000).to_integral_value(ROUND_CEILING))


def _models(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    models = texts(body, name)
    if len(models) > _MAXIMUM_MODELS:
        raise BadRequest(f"{name} may have {_MAXIMUM_MODELS} entries.", param=name)
    for model in models:
        if model in _NO_MODELS or "*" in model[:-1]:
            raise BadRequest(
                f"{name}: {model[:64]!r} is no model here: name them as vLLM does, with one * at the end for all that "
                "begin so, or leave the field empty for all.",
                param=name,
            )
    return models


def _by_model(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object whose names are models."""
    value: dict[str, Any] = typed(body, name, dict, "an object with models as names") or {}
    if len(value) > _MAXIMUM_MODELS:
        raise BadRequest(f"{name} may have {_MAXIMUM_MODELS} entries.", param=name)
    return {_checked(model, name): each for model, each in value.items() if model}


def _aliases(body: Mapping[str, Any], name: str) -> dict[str, str]:
    aliases = _by_model(body, name)
    for model in aliases.values():
        if not isinstance(model, str) or not model:
            raise BadRequest(f"{name} must give each alias the name of a model.", param=name)
        _checked(model, name)
    return aliases


def _limit_by_model(body: Mapping[str, Any], name: str) -> dict[str, int]:
    limits = {model: _limit({name: each}, name) for model, each in _by_model(body, name).items()}
    return {model: each for model, each in limits.items() if each is not None}


def _key_type(body: Mapping[str, Any], name: str) -> str:
    key_type = text(body, name) or "default"
    if key_type not in KEY_TYPES:
        raise BadRequest(f"{name} must be one of {', '.join(KEY_TYPES)}.", param=name)
    return key_type


def _routes(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
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


_FIELDS: Final[dict[str, Callable[[Mapping[str, Any], str], Any]]] = {
    "aliases": _aliases,
    "allowed_routes": _routes,
    "blocked": _flag,
    "key_alias": text,
    "key_type": _key_type,
    "max_budget": money,
    "max_budget_tokens": _limit,
    "max_parallel_requests": _limit,
    "metadata": _metadata,
    "model_rpm_limit": _limit_by_model,
    "model_tpm_limit": _limit_by_model,
    "models": _models,
    "rpm_limit": _limit,
    "soft_budget": money,
    "tags": texts,
    "team_id": text,
    "tpm_limit": _limit,
    "user_id": text,
}
