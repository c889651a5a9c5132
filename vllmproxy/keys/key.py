"""The virtual key as a value."""

import hashlib
from typing import Any

from attrs import field, frozen


def hash_key(key: str | bytes) -> str:
    """Return the sha256 hex of a key: its id everywhere (LiteLLM's ``token``); the key itself is never kept."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


@frozen(kw_only=True)
class VirtualKey:
    """A stored virtual key: LiteLLM's row, in its field names. Times are seconds since the epoch (UTC).

    :ivar token: ``hash_key`` of the key.
    :ivar key_name: ``sk-...`` and the key's last four characters, for people to recognise it by.
    :ivar expires: when it stops working, ``None``: never.
    """

    token: str
    key_name: str
    key_alias: str | None = None
    user_id: str | None = None
    team_id: str | None = None
    metadata: dict[str, Any] = field(factory=dict)
    tags: tuple[str, ...] = ()
    blocked: bool = False
    expires: float | None = None
    created_at: float = 0.0
    updated_at: float = 0.0
    created_by: str | None = None
    updated_by: str | None = None
