"""A virtual key as the text that every store keeps, and names as the bytes it is found by."""

import json
from typing import Any

import attrs

from vllmproxy.keys.key import VirtualKey


def dump_row(key: VirtualKey) -> str:
    """Return ``key`` as one line of ASCII JSON, with the field names of :class:`VirtualKey`.

    ASCII, because ``metadata`` may hold anything that JSON can say, lone surrogates among it, which neither
    SQLite nor a UTF-8 connection would take.
    """
    return json.dumps(attrs.asdict(key, recurse=False), separators=(",", ":"))


def load_row(text: str | bytes) -> VirtualKey:
    """Return the key that :func:`dump_row` wrote as ``text``.

    A field that is not known here is an error, not a thing to leave out: it may be what restricts the key.

    :raises ValueError: the text is not such a row.
    """
    fields: Any = json.loads(text)
    try:
        return VirtualKey(**{**fields, "tags": tuple(fields.get("tags", ()))})
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a row of a virtual key: {error}") from error


def name_bytes(name: str) -> bytes:
    """Return a token or an alias as bytes: different for different names, whatever characters they have."""
    return name.encode("utf-8", "surrogatepass")


def name_text(name: bytes) -> str:
    """Return what :func:`name_bytes` was given."""
    return name.decode("utf-8", "surrogatepass")
