"""Reads the caller's key out of a request's header fields. Pure."""

from collections.abc import Mapping
from typing import Final, Literal

from attrs import frozen

from vllmproxy.keys.key import hash_key

#: The headers a key may come in, lower-case, in LiteLLM's order: the first one that is there counts.
CREDENTIAL_HEADERS: Final = (b"x-litellm-api-key", b"authorization", b"api-key", b"x-api-key")


@frozen
class Credential:
    """What a caller showed.

    :ivar state: ``none``: no header; ``malformed``: one that cannot be read as a key; ``present``.
    :ivar token: the key's sha256 hex, empty unless ``present``. The key itself is let go.
    """

    state: Literal["none", "malformed", "present"]
    token: str = ""


NO_CREDENTIAL: Final = Credential("none")
MALFORMED: Final = Credential("malformed")


def read_credential(fields: Mapping[bytes, list[bytes]]) -> Credential:
    """Return the credential in ``fields`` (lower-case name → its values).

    ``Authorization`` takes ``Bearer <key>`` only; the others take the key bare or with ``Bearer``. An empty
    header is no header; one that is given several times with different values is malformed.
    """
    for name in CREDENTIAL_HEADERS:
        values = fields.get(name)
        if not values:
            continue
        value = values[0].strip(b" \t")
        if len(values) > 1 and any(other.strip(b" \t") != value for other in values):
            return MALFORMED
        if value:
            return _parse(value, bare=name != b"authorization")
    return NO_CREDENTIAL


def _parse(value: bytes, *, bare: bool) -> Credential:
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        secret = rest.strip(b" \t")
    elif bare:
        secret = value
    else:
        return MALFORMED
    if not secret or b" " in secret or b"\t" in secret:
        return MALFORMED
    return Credential("present", hash_key(secret))
