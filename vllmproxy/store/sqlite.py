"""The embedded store: one SQLite file, which outlives the process, a kill -9 and a power cut."""

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from twisted.enterprise.adbapi import ConnectionPool, Transaction
from twisted.internet.threads import deferToThreadPool

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.calls import Calls
from vllmproxy.store.interface import (
    SCHEMA_VERSION,
    AliasTaken,
    CannotOpenStore,
    StoreUnavailable,
    TokenTaken,
)
from vllmproxy.store.rows import dump_row, load_row, name_bytes, name_text

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds that a thread waits for another process's write; shorter than a call's deadline, so that a thread
#: is free again by the time its caller has given up, and closing never waits longer than this.
_BUSY_SECONDS = 1.0

#: Names are BLOBs holding UTF-8, because TEXT cannot hold every Python string.
_TABLE = "CREATE TABLE keys (token BLOB PRIMARY KEY, alias BLOB UNIQUE, row TEXT NOT NULL) WITHOUT ROWID"


class SqliteStore:
    """The :class:`~vllmproxy.store.interface.Store` in one file.

    :param path: the file; it is created with mode 0600, its directory with 0700, where they do not exist.
    :param reactor: provides ``IReactorCore``, ``IReactorTime`` and ``IReactorThreads``. The threads are the
        store's own, started by :meth:`open` and stopped by :meth:`close`.
    :param timeout: seconds that any call may take.
    """

    def __init__(self, path: Path, reactor: Any, *, timeout: float = 2.0) -> None:
        self._path = path.absolute()  # also keeps ":memory:" from being anything but a file name
        self._reactor = reactor
        self._timeout = timeout
        self._calls = Calls(reactor)
        self._pool: ConnectionPool | None = None

    async def open(self) -> None:
        if self._pool is not None:
            return
        # Made here and not in __init__: a daemon forks in between, and threads do not survive that.
        pool = ConnectionPool(
            "sqlite3",
            str(self._path),
            timeout=_BUSY_SECONDS,
            isolation_level="IMMEDIATE",
            check_same_thread=False,  # adbapi closes its threads' connections from the reactor's
            cp_reactor=self._reactor,
            cp_openfun=_configure,
            cp_min=1,
            cp_max=3,
        )
        try:
            await self._calls.run(deferToThreadPool(self._reactor, pool.threadpool, prepare, self._path), self._timeout)
            self._pool = pool
        except StoreUnavailable as error:
            raise CannotOpenStore(f"{self._path}: {error}") from error
        finally:
            if self._pool is not pool:
                pool.close()

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        self._calls.end()
        if pool is not None:
            pool.close()

    async def ping(self) -> None:
        await self._run(_ping)

    async def add_key(self, key: VirtualKey) -> None:
        alias = None if key.key_alias is None else name_bytes(key.key_alias)
        not_after = self._reactor.seconds() + self._timeout
        pool = self._pool

        def late() -> bool:
            return self._pool is not pool or self._reactor.seconds() > not_after

        await self._run(_add, (name_bytes(key.token), alias, dump_row(key)), late)

    async def get_key(self, token: str) -> VirtualKey | None:
        return await self._run(_get, token)

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        return await self._run(_find_aliases, tuple(aliases))

    async def delete_keys(self, tokens: Sequence[str]) -> list[str]:
        return await self._run(_delete, tuple(tokens))

    async def _run(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what ``work`` returns in a thread, inside one transaction."""
        if self._pool is None:
            raise StoreUnavailable("the store is closed")
        call = self._pool.runInteraction(work, *args, **kwargs)
        try:
            result: T = await self._calls.run(call, self._timeout)
        except (sqlite3.Error, ValueError) as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error
        return result


def prepare(path: Path) -> None:
    """Create the file and its schema where there are none, and check them where there are. Blocks.

    :raises CannotOpenStore: says what is wrong with the file.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise CannotOpenStore(f"{path} cannot be created: {error.strerror}") from error
    if path.is_dir():
        raise CannotOpenStore(f"{path} is a directory: name a file with --store sqlite:PATH")
    try:
        _prepare_patiently(path)
    except sqlite3.Error as error:
        raise CannotOpenStore(f"{path} cannot be used as the key store: {error}") from error


def _prepare_patiently(path: Path) -> None:
    """Check the file; changing the journal's mode does not by itself wait for others that just do the same."""
    give_up = time.monotonic() + _BUSY_SECONDS
    while True:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            _check(path, connection)
            # Lookups never wait for a writer. The mode is kept in the file.
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        finally:
            connection.close()
        time.sleep(0.02)


def _check(path: Path, connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")  # of several processes that start at once, one makes the table
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version, tables) == (0, 0):
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        version = SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise CannotOpenStore(
            f"{path} has schema version {version}, and this vllmproxy reads version {SCHEMA_VERSION}: "
            "name another file with --store sqlite:PATH, or run the vllmproxy that wrote this one"
        )
    (state,) = connection.execute("PRAGMA quick_check('keys')").fetchone()
    if state != "ok":
        raise CannotOpenStore(f"{path} is damaged ({state}): move it away or bring back a copy of it")
    connection.execute("COMMIT")


def _configure(connection: sqlite3.Connection) -> None:
    # A commit is on the disk, not only with the kernel, before it is acknowledged: a new key and (worse to
    # lose) a revocation survive a power cut. NORMAL would survive kill -9 only. Writes are rare.
    connection.execute("PRAGMA synchronous = FULL")


def _ping(transaction: Transaction) -> None:
    transaction.execute("SELECT 1 FROM keys LIMIT 1")


def _add(transaction: Transaction, values: tuple[bytes, bytes | None, str], late: Callable[[], bool]) -> None:
    try:
        transaction.execute("INSERT INTO keys VALUES (?, ?, ?)", values)
    except sqlite3.IntegrityError as error:
        transaction.execute("SELECT 1 FROM keys WHERE token = ?", values[:1])
        raise (AliasTaken if transaction.fetchone() is None else TokenTaken) from error
    if late():
        # Rolled back: the caller has been told that this failed, so nobody was given the key.
        raise StoreUnavailable("the store was closed or too slow")


def _get(transaction: Transaction, token: str) -> VirtualKey | None:
    transaction.execute("SELECT row FROM keys WHERE token = ?", (name_bytes(token),))
    found = transaction.fetchone()
    return None if found is None else load_row(found[0])


def _find_aliases(transaction: Transaction, aliases: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for alias in aliases:
        transaction.execute("SELECT token FROM keys WHERE alias = ?", (name_bytes(alias),))
        for (token,) in transaction.fetchall():
            found[alias] = name_text(token)
    return found


def _delete(transaction: Transaction, tokens: Sequence[str]) -> list[str]:
    deleted = []
    for token in tokens:
        transaction.execute("DELETE FROM keys WHERE token = ?", (name_bytes(token),))
        if transaction.rowcount:
            deleted.append(token)
    return deleted
