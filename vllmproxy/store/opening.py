"""From ``--store`` to a store."""

from pathlib import Path
from typing import Any

from vllmproxy.store.address import REDIS_SCHEMES
from vllmproxy.store.interface import Store
from vllmproxy.store.memory import MemoryStore
from vllmproxy.store.sqlite import SqliteStore


def make_store(url: str, *, reactor: Any, state_directory: Path | None = None) -> Store:
    """Return the store that ``url`` names, not opened yet; nothing is touched or connected to.

    :param url: ``memory:``, ``sqlite:PATH`` or a Redis URL, see
        :func:`~vllmproxy.store.address.parse_redis_url`.
    :param reactor: see the stores.
    :param state_directory: what a relative ``sqlite:`` path is relative to, else the working directory.
    :raises ValueError: one sentence that says what is wrong, without any password.
    """
    scheme, colon, rest = url.partition(":")
    if url == "memory:":
        return MemoryStore()
    if colon and scheme == "sqlite":
        return SqliteStore((state_directory or Path()) / _sqlite_path(rest), reactor)
    if colon and scheme in REDIS_SCHEMES:
        # Only here, because importing txredisapi installs the default reactor.
        from vllmproxy.store.redis import RedisStore  # noqa: PLC0415

        return RedisStore(url, reactor)
    raise ValueError("the store must be memory:, sqlite:PATH, redis://…, rediss://…, unix://… or redis+sentinel://…")


def _sqlite_path(text: str) -> str:
    if not text or "\0" in text or (text.startswith("//") and not text.startswith("///")):
        raise ValueError("the SQLite store is written sqlite:PATH, as in sqlite:/var/lib/vllmproxy/keys.sqlite3")
    return text
