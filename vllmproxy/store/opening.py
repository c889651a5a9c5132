"""From ``--store`` to a store."""

from pathlib import Path
from typing import Any

from vllmproxy.store.address import REDIS_SCHEMES, parse_redis_url
from vllmproxy.store.interface import Store
from vllmproxy.store.memory import MemoryStore
from vllmproxy.store.sqlite import SqliteStore

#: The file of ``sqlite:`` without a path, in the state directory.
DEFAULT_FILE = "vllmproxy.sqlite3"


def make_store(url: str, *, reactor: Any, state_directory: Path | None = None) -> Store:
    """Return the store that ``url`` names, not opened yet; nothing is touched or connected to.

    :param url: ``memory:``, ``sqlite:PATH`` or a Redis URL, see
        :func:`~vllmproxy.store.address.parse_redis_url`.
    :param reactor: see the stores.
    :param state_directory: what a relative ``sqlite:`` path is relative to (else the working directory), and
        where ``sqlite:`` without a path keeps its file.
    :raises ValueError: one sentence that says what is wrong, without any password.
    """
    scheme, colon, rest = url.partition(":")
    if url == "memory:":
        return MemoryStore()
    if colon and scheme == "sqlite":
        return SqliteStore(_sqlite_path(rest, state_directory), reactor)
    if colon and scheme in REDIS_SCHEMES:
        # Only here, because importing txredisapi installs the default reactor.
        from vllmproxy.store.redis import RedisStore  # noqa: PLC0415

        return RedisStore(url, reactor)
    raise ValueError("the store must be memory:, sqlite:PATH, redis://…, rediss://…, unix://… or redis+sentinel://…")


def _sqlite_path(text: str, state_directory: Path | None) -> Path:
    if "\0" in text or (text.startswith("//") and not text.startswith("///")):
        raise ValueError("the SQLite store is written sqlite:PATH, as in sqlite:/var/lib/vllmproxy/keys.sqlite3")
    if text or state_directory:
        return (state_directory or Path()) / (text or DEFAULT_FILE)
    raise ValueError("sqlite: without a path needs a state directory")


def redact(url: str) -> str:
    """Return a store's URL for logs and errors: without user and password, and nothing at all of a bad one."""
    if url.startswith(("memory:", "sqlite:")):
        return url
    try:
        return str(parse_redis_url(url))
    except ValueError:
        return "(a store URL that cannot be read)"
