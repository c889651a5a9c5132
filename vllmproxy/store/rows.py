"""A virtual key as the text that every store keeps, and names as the bytes it is found by."""

import json
from types import NoneType, UnionType
from typing import Any, Final, get_args

import attrs

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.interface import AuditEntry

#: What a row says only where it is otherwise. None of this can ever be changed: there are rows that go by it.
_DEFAULTS: Final = attrs.asdict(
    VirtualKey(token="", key_name=""), recurse=False, filter=lambda a, _: bool(a.default is not attrs.NOTHING)
)
#: What JSON has lists for.
_TUPLES: Final = tuple(name for name, value in _DEFAULTS.items() if value == ())


def _types_of(annotation: Any) -> frozenset[type]:
    """Return the types that a field's value may have, none where that is not said by plain ones."""
    given = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if not {*given} <= {int, float, str, bool, NoneType}:
        return frozenset()
    return frozenset(given) | {int} if float in given else frozenset(given)


_TYPES: Final = {each.name: types for each in attrs.fields(VirtualKey) if (types := _types_of(each.type))}
_COUNTS: Final = ("model_rpm_limit", "model_tpm_limit")

# json.loads would find out the encoding of bytes, and whether it has been told of another decoder, each time.
_decode = json.JSONDecoder().decode


def dump_row(key: VirtualKey) -> str:
    """Return ``key`` as one line of ASCII JSON, with the field names of :class:`VirtualKey`; what is as by default is
    left out.

    ASCII, because ``metadata`` may hold anything that JSON can say, lone surrogates among it, which neither
    SQLite nor a UTF-8 connection would take.
    """
    fields = attrs.asdict(key, recurse=False, filter=lambda a, _: a.init)
    return _dump({name: value for name, value in fields.items() if name not in _DEFAULTS or value != _DEFAULTS[name]})


def load_row(text: str | bytes) -> VirtualKey:
    """Return the key that :func:`dump_row` wrote as ``text``, in this version or an older one.

    A field that is not known here is an error, not a thing to leave out: it may be what restricts the key, and
    it would be lost with the next change. So is a key type or a route that is not known.

    :raises ValueError: the text is not such a row.
    """
    fields: Any = _decode(text if isinstance(text, str) else text.decode("ascii"))
    try:
        for name, value in fields.items():
            if type(value) not in _TYPES.get(name, (type(value),)):
                raise TypeError(f"{name} cannot be of type {type(value).__name__}")
        for name in _COUNTS:
            if any(type(value) is not int for value in fields.get(name, {}).values()):
                raise TypeError(f"{name} has whole numbers")
        for name in _TUPLES:
            if name in fields:
                fields[name] = tuple(fields[name])
        key = VirtualKey(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"not a row of a virtual key: {error}") from error
    return key


def dump_entry(entry: AuditEntry) -> str:
    """Return an audit entry as one line of ASCII JSON."""
    return _dump(attrs.asdict(entry, recurse=False))


def load_entry(text: str | bytes) -> dict[str, Any]:
    """Return the fields that :func:`dump_entry` wrote, and any others.

    :raises ValueError: the text is not an entry.
    """
    fields: Any = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("not an audit entry")
    return fields


def name_bytes(name: str) -> bytes:
    """Return a token or an alias as bytes: different for different names, whatever characters they have."""
    return name.encode("utf-8", "surrogatepass")


def name_text(name: bytes) -> str:
    """Return what :func:`name_bytes` was given."""
    return name.decode("utf-8", "surrogatepass")


def _dump(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))
