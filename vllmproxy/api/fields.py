"""The bodies of the key API as values: what may be asked, and what is answered. Pure."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from attrs import field, frozen

from vllmproxy.api.values import (
    aliases,
    custom_key,
    flag,
    key_type,
    limit,
    limit_by_model,
    metadata,
    models,
    money,
    parse_duration,
    refuse_unknown,
    routes,
    text,
    texts,
)
from vllmproxy.errors import BadRequest
from vllmproxy.keys.budget import Budget
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.usage.prices import currency
from vllmproxy.usage.sums import NO_ACCOUNT, Account

#: Levels of nesting in a body; Python's own readers and writers of JSON give up, each at another depth.
_DEEPEST: Final = 32
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
    refuse_unknown(
        [name for name in body if name not in _UNSUPPORTED], _FIELDS.keys() | {"duration", "budget_duration"}
    )
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


def row_of(key: VirtualKey, now: float, account: Account = NO_ACCOUNT) -> dict[str, Any]:
    """Return LiteLLM's row for ``key`` as it is at ``now`` (epoch seconds), without its token.

    :param account: what it has spent.
    """
    period, reset_at = key.budget.period(now)
    spent = account if account.period >= period else NO_ACCOUNT
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
        "max_budget": None if key.max_budget is None else currency(key.max_budget),
        "soft_budget": None if key.soft_budget is None else currency(key.soft_budget),
        "max_budget_tokens": key.max_budget_tokens,
        "budget_duration": key.budget_duration,
        "budget_reset_at": None if reset_at is None else _iso(reset_at),
        "expires": None if key.expires is None else _iso(key.expires),
        "created_at": _iso(key.created_at),
        "updated_at": _iso(key.updated_at),
        "created_by": key.created_by,
        "updated_by": key.updated_by,
        **_NOT_ENFORCED,
        "spend": currency(spent.spend),
        "spend_tokens": spent.tokens,
    }


def token_of(key: str) -> str:
    """Return the id of a key that is named by itself or by its sha256 hex."""
    return key if _TOKEN.fullmatch(key) else hash_key(key)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_unset(value: Any, unset: Any) -> bool:
    """Zero is a limit, except where zero is what LiteLLM itself answers; so are True and False."""
    return value is None or value in ("", [], {}) or (unset is not None and value == unset)


_FIELDS: Final[dict[str, Callable[[Mapping[str, Any], str], Any]]] = {
    "aliases": aliases,
    "allowed_routes": routes,
    "blocked": flag,
    "key_alias": text,
    "key_type": key_type,
    "max_budget": money,
    "max_budget_tokens": limit,
    "max_parallel_requests": limit,
    "metadata": metadata,
    "model_rpm_limit": limit_by_model,
    "model_tpm_limit": limit_by_model,
    "models": models,
    "rpm_limit": limit,
    "soft_budget": money,
    "tags": texts,
    "team_id": text,
    "tpm_limit": limit,
    "user_id": text,
}
