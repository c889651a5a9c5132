"""The master key: the one that manages keys and opens every route."""

import hmac
from typing import Final

from vllmproxy.keys.key import hash_key

MINIMUM_LENGTH: Final = 16

#: Keys out of tutorials and of every guesser's list, lower-case and without ``sk-``. Ascending digits
#: (``sk-1234``, ``sk-12345`` …) are recognised by rule.
_WELL_KNOWN: Final = frozenset(
    {
        "admin",
        "anything",
        "changeme",
        "changemechangeme",
        "change-me",
        "default",
        "litellm-master-key",
        "master",
        "master-key",
        "my-master-key",
        "password",
        "passwordpassword",
        "secret",
        "test",
        "your-master-key",
    }
)


class MasterKey:
    """Holds only the key's sha256, so that nothing which prints this object can print the key."""

    __slots__ = ("_token",)

    def __init__(self, key: str | bytes) -> None:
        self._token = hash_key(key).encode()

    def matches_token(self, token: str) -> bool:
        """Tell whether ``token`` is the master key's sha256 hex, in time that does not depend on where they differ."""
        return hmac.compare_digest(self._token, token.encode())

    def __repr__(self) -> str:
        return "<MasterKey>"


def weakness(key: str) -> str | None:
    """Return one sentence (without the key) on why ``key`` is easy to guess, ``None`` if it is not."""
    bare = key.lower().removeprefix("sk-")
    if bare in _WELL_KNOWN or bare.replace("_", "-") in _WELL_KNOWN or _is_counting(bare):
        return "the master key is a well-known example; make one with: openssl rand -hex 24"
    if len(key) < MINIMUM_LENGTH:
        return f"the master key is shorter than {MINIMUM_LENGTH} characters; make one with: openssl rand -hex 24"
    if len(set(bare)) < 5:
        return "the master key repeats a few characters; make one with: openssl rand -hex 24"
    return None


def _is_counting(text: str) -> bool:
    digits = "1234567890" * (len(text) // 10 + 1)
    return bool(text) and digits.startswith(text)
