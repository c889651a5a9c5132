"""What the proxy asks of a store; memory, SQLite and Redis are its three twins."""

from collections.abc import Sequence
from typing import Protocol

from vllmproxy.keys.key import VirtualKey

#: The layout of what is stored. A store that finds another version than this one refuses to open.
SCHEMA_VERSION = 1


class AliasTaken(Exception):
    """Another key already has that alias; choose a different one or delete that key first."""


class TokenTaken(Exception):
    """That very key exists already; leave ``key`` out to have a fresh one made."""


class StoreUnavailable(Exception):
    """The store did not answer in time or cannot be reached; nothing is known about the key either way."""


class CannotOpenStore(Exception):
    """The store cannot be used at all (unreadable file, wrong schema version, refused connection): do not start."""


class Store(Protocol):
    """Keeps virtual keys. Every method may raise :class:`StoreUnavailable` and ends within its own deadline."""

    async def open(self) -> None:
        """Connect, and create or check the schema. Raises :class:`CannotOpenStore`."""

    async def close(self) -> None:
        """Let go of everything; pending calls fail with :class:`StoreUnavailable`. Idempotent."""

    async def ping(self) -> None:
        """Return when the store answers."""

    async def add_key(self, key: VirtualKey) -> None:
        """Keep a new key, whole or not at all. Raises :class:`AliasTaken`, :class:`TokenTaken`."""

    async def get_key(self, token: str) -> VirtualKey | None:
        """Return the key with that id (sha256 hex), ``None`` when there is none."""

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        """Return alias → token for those of ``aliases`` that exist."""

    async def delete_keys(self, tokens: Sequence[str]) -> list[str]:
        """Delete those that exist, their aliases with them, and return the tokens that were deleted."""
