"""The bodies of the key API as values: what may be asked, and what is answered. Pure."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from attrs import field, frozen

from vllmproxy.errors import BadRequest
from vllmproxy.keys.durations import seconds_of
from vllmproxy.keys.key import VirtualKey, hash_key

MINIMUM_CUSTOM_KEY: Final = 16
_MAXIMUM_TEXT: Final = 255
_CUSTOM_KEY: Final = re.compile(r"sk-[\x21-\x7e]{13,252}")
_TOKEN: Final = re.compile(r"[0-9a-f]{64}")

#: LiteLLM's row fields for restrictions that are not enforced yet, with what it answers where they are not
#: set. Given with any other value they are refused: a limit that is taken and not kept is worse than none.
_NOT_ENFORCED: Final[dict[str, Any]] = {
    "models": [],
    "aliases": {},
    "config": {},
    "permissions": {},
    "allowed_routes": [],
    "allowed_cache_controls": [],
    "spend": 0.0,
    "max_budget": None,
    "soft_budget": None,
    "budget_duration": None,
    "budget_id": None,
    "rpm_limit": None,
    "tpm_limit": None,
    "max_parallel_requests": None,
    "model_max_budget": {},
    "model_rpm_limit": None,
    "model_tpm_limit": None,
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

_GENERATE: Final = frozenset(
    {
        "blocked",
        "duration",
        "key",
        "key_alias",
        "key_type",
        "metadata",
        "tags",
        "team_id",
        "user_id",
    }
)
_DELETE: Final = frozenset({"keys", "key_aliases"})


@frozen(kw_only=True)
class GenerateKey:
    """What ``POST /key/generate`` asks for.

    :ivar key: a custom key, ``None``: make one.
    :ivar duration: as sent.
    :ivar lasts: the same in seconds, ``None``: for ever.
    """

    key: str | None = field(repr=False)
    key_alias: str | None
    user_id: str | None
    team_id: str | None
    metadata: dict[str, Any]
    tags: tuple[str, ...]
    blocked: bool
    duration: str | None
    lasts: int | None


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
        # Lone surrogates cannot be stored or hashed; this is the cheapest way to find one anywhere inside.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    return value


def parse_generate(body: Mapping[str, Any], now: float) -> GenerateKey:
    """Return what ``body`` asks for. Raises :class:`BadRequest` with the field's name as ``param``."""
    _refuse_unknown(body, _GENERATE | _UNSUPPORTED.keys())
    for name, unset in _UNSUPPORTED.items():
        if not _is_unset(body.get(name), unset):
            raise BadRequest(f"{name} is not enforced by this version; leave it out.", param=name)
    if body.get("key_type") not in (None, "default"):
        raise BadRequest('key_type can only be "default" in this version; leave it out.', param="key_type")
    duration = _text(body, "duration")
    try:
        lasts = seconds_of(duration, now)
    except ValueError as error:
        raise BadRequest(f"duration: {error}.", param="duration") from None
    return GenerateKey(
        key=_custom_key(body),
        key_alias=_text(body, "key_alias"),
        user_id=_text(body, "user_id"),
        team_id=_text(body, "team_id"),
        metadata=_typed(body, "metadata", dict, "an object") or {},
        tags=_texts(body, "tags"),
        blocked=_typed(body, "blocked", bool, "true or false") or False,
        duration=duration,
        lasts=lasts,
    )


def parse_delete(body: Mapping[str, Any]) -> DeleteKeys:
    """Return what ``body`` asks for. Raises :class:`BadRequest`."""
    _refuse_unknown(body, _DELETE)
    wanted = DeleteKeys(keys=_texts(body, "keys"), aliases=_texts(body, "key_aliases"))
    if not wanted.keys and not wanted.aliases:
        raise BadRequest("Name the keys to delete: keys (keys or their hashes) or key_aliases.", param="keys")
    return wanted


def new_key(wanted: GenerateKey, key: str, now: float, created_by: str | None) -> VirtualKey:
    """Return the row for ``key``, which is made at ``now`` (epoch seconds)."""
    return VirtualKey(
        token=hash_key(key),
        key_name=f"sk-...{key[-4:]}",
        key_alias=wanted.key_alias,
        user_id=wanted.user_id,
        team_id=wanted.team_id,
        metadata=wanted.metadata,
        tags=wanted.tags,
        blocked=wanted.blocked,
        expires=None if wanted.lasts is None else now + wanted.lasts,
        created_at=now,
        updated_at=now,
        created_by=created_by,
        updated_by=created_by,
    )


def row_of(key: VirtualKey) -> dict[str, Any]:
    """Return LiteLLM's row for ``key``, without its token."""
    return {
        "key_name": key.key_name,
        "key_alias": key.key_alias,
        "key_type": "default",
        "user_id": key.user_id,
        "team_id": key.team_id,
        "metadata": key.metadata,
        "tags": list(key.tags),
        "blocked": key.blocked,
        "expires": None if key.expires is None else _iso(key.expires),
        "created_at": _iso(key.created_at),
        "updated_at": _iso(key.updated_at),
        "created_by": key.created_by,
        "updated_by": key.updated_by,
        **_NOT_ENFORCED,
    }


def token_of(key: str) -> str:
    """Return the id of a key that is named by itself or by its sha256 hex."""
    return key if _TOKEN.fullmatch(key) else hash_key(key)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_unknown(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in body:
        if name not in known:
            # The name is the caller's own text: cut, so that an answer stays a sentence.
            raise BadRequest(f"Unknown field {name[:64]!r}.", param=name[:64])


def _is_unset(value: Any, unset: Any) -> bool:
    """Zero is a limit, except where zero is what LiteLLM itself answers; so are True and False."""
    return value is None or value in ("", [], {}) or (unset is not None and value == unset)


def _typed(body: Mapping[str, Any], name: str, kind: type, description: str) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise BadRequest(f"{name} must be {description}.", param=name)
    return value


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = _typed(body, name, str, "a string")
    return _checked(value, name) if value else None


def _texts(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _typed(body, name, list, "a list of strings") or []
    if not all(isinstance(value, str) and value for value in values):
        raise BadRequest(f"{name} must be a list of strings, none of them empty.", param=name)
    return tuple(dict.fromkeys(_checked(value, name) for value in values))


def _checked(text: str, name: str) -> str:
    if len(text) > _MAXIMUM_TEXT or not text.isprintable():
        raise BadRequest(f"{name} must be at most {_MAXIMUM_TEXT} characters without control characters.", param=name)
    return text


def _custom_key(body: Mapping[str, Any]) -> str | None:
    key: str | None = _typed(body, "key", str, "a string") or None
    if key is not None and not _CUSTOM_KEY.fullmatch(key):
        raise BadRequest(
            f"A custom key starts with sk- and has at least {MINIMUM_CUSTOM_KEY} (at most {_MAXIMUM_TEXT}) "
            "characters: letters, digits and signs, no spaces.",
            param="key",
        )
    return key
