"""Names for requests that nobody else has, and nobody can guess."""

from os import urandom
from typing import Final

#: How many ids the bytes of one call into the kernel do for.
_AT_ONCE: Final = 64

_pool: Final[list[bytes]] = []


def fresh_id() -> bytes:
    """Return a new request id: 32 hexadecimal digits."""
    if not _pool:
        digits = urandom(16 * _AT_ONCE).hex().encode()
        _pool.extend([digits[start : start + 32] for start in range(0, len(digits), 32)])
    return _pool.pop()
