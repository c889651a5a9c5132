"""The embedded store: one SQLite file, which outlives the process, a kill -9 and a power cut."""

import sqlite3
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Concatenate, ParamSpec, TypeVar

from twisted.enterprise.adbapi import ConnectionPool, Transaction
from twisted.internet.defer import Deferred, DeferredSemaphore, fail
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.interface import Limiter
from vllmproxy.store import usage_sqlite
from vllmproxy.store.calls import Calls
from vllmproxy.store.changes import LIST_SECONDS, Changes, account_changes
from vllmproxy.store.interface import (
    AliasTaken,
    CannotOpenStore,
    Decide,
    StoredEntry,
    StoreUnavailable,
    Writes,
)
from vllmproxy.store.limits_memory import MemoryLimiters
from vllmproxy.store.listing import KeyPage, KeyQuery, Selection
from vllmproxy.store.rows import dump_entry, dump_row, load_entry, load_row, name_bytes, name_text
from vllmproxy.store.sqlite_schema import BUSY_SECONDS, end_with, prepare
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import Tally
from vllmproxy.usage.sums import Account, UsageQuery, UsageSum

_log = Logger(namespace=__name__)

P = ParamSpec("P")
T = TypeVar("T")

_INSERT = "INSERT INTO keys (token, alias, row, created) VALUES (?, ?, ?, ?)"
_MAXIMUM_ID = 2**63 - 1
_DAY = 86_400


class SqliteStore(Changes):
    """The :class:`~vllmproxy.store.interface.Store` in one file. Of what another process with the same file changes it
    does not hear: that takes as long as keys are cached.

    :param path: the file; it is created with mode 0600, its directory with 0700, where they do not exist.
    :param reactor: provides ``IReactorCore``, ``IReactorTime`` and ``IReactorThreads``. The threads are the
        store's own, started by :meth:`open` and stopped by :meth:`close`.
    :param timeout: seconds that any call may take; :meth:`open` takes as long as the file needs.
    """

    def __init__(self, path: Path, reactor: Any, *, timeout: float = 2.0) -> None:
        self._path = path.absolute()  # also keeps ":memory:" from being anything but a file name
        self._reactor = reactor
        self._timeout = timeout
        self._calls = Calls(reactor)
        self._pool: ConnectionPool | None = None
        self._ended = Event()
        self._limiters = MemoryLimiters(self.read_account)
        self._watchers = []
        #: What takes long has one of the threads, so that look-ups find another.
        self._long = DeferredSemaphore(1)
        self._daily = LoopingCall(self._remove_old)
        self._daily.clock = reactor

    async def open(self) -> None:
        if self._pool is not None:
            return
        self._ended = ended = Event()
        # Made here and not in __init__: a daemon forks in between, and threads do not survive that.
        pool = ConnectionPool(
            "sqlite3",
            str(self._path),
            timeout=BUSY_SECONDS,
            isolation_level="IMMEDIATE",
            check_same_thread=False,  # adbapi closes its threads' connections from the reactor's
            cp_reactor=self._reactor,
            cp_openfun=partial(_configure, ended=ended),
            cp_min=1,
            cp_max=3,
        )
        try:
            await deferToThreadPool(self._reactor, pool.threadpool, prepare, self._path, ended)
            await pool.runInteraction(usage_sqlite.remove_old, self._today())
            self._pool = pool
            self._daily.start(_DAY, now=False)
        except sqlite3.Error as error:
            raise CannotOpenStore(f"{self._path}: {error}") from error
        finally:
            if self._pool is not pool:
                ended.set()
                pool.close()

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if self._daily.running:
            self._daily.stop()
        self._calls.end()
        if pool is not None:
            self._ended.set()
            pool.close()

    def limiter(self, clock: IReactorTime) -> Limiter:
        return self._limiters.make(clock)

    async def ping(self) -> None:
        await self._run(_ping)

    async def change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes:
        call = self._write(_change, tuple(tokens), decide)
        return await self._result(call.addCallback(self._changed), self._timeout)

    def _changed(self, changed: tuple[Writes, dict[str, Account]]) -> Writes:
        """Keys have changed, though whoever had them changed may have given up."""
        writes, spent = changed
        self._limiters.changed(writes, spent)
        self._tell(writes.tokens)
        return writes

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        return Deferred.fromCoroutine(self._run(_get, token))

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        return await self._run(_find_aliases, tuple(aliases))

    async def list_audit(self, limit: int, before: str | None = None) -> list[StoredEntry]:
        return await self._run(_list_audit, limit, before)

    async def add_usage(
        self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None
    ) -> None:
        call = self._write(usage_sqlite.add, writer, first, tuple(events), tally)
        accounts = await self._result(call, self._timeout)
        self._limiters.added(accounts, events)

    async def forget_writer(self, writer: str) -> None:
        await self._run(usage_sqlite.forget, writer)

    async def read_usage(self, query: UsageQuery) -> list[UsageSum]:
        return await self._run_long(usage_sqlite.read, query)

    async def read_account(self, token: str) -> Account:
        return await self._run(usage_sqlite.account, token)

    async def _list(self, query: KeyQuery) -> KeyPage:
        return await self._run_long(_list_keys, query)

    async def _run_long(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what ``work`` returns, after others that take long. Its thread is its own until it is done, however
        early its caller gives up."""
        await self._calls.run(self._long.acquire(), LIST_SECONDS)

        def done(result: Any) -> Any:
            self._long.release()
            return result

        return await self._result(self._begin(work, *args, **kwargs).addBoth(done), LIST_SECONDS)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._reactor.seconds(), UTC).strftime("%Y-%m-%d")

    def _remove_old(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._run_long(usage_sqlite.remove_old, self._today())).addErrback(_not_removed)

    async def _run(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what ``work`` returns in a thread, inside one transaction."""
        return await self._result(self._begin(work, *args, **kwargs), self._timeout)

    def _write(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Have ``work`` change something, unless it comes too late."""
        ended, not_after = self._ended, self._reactor.seconds() + self._timeout

        def late() -> bool:
            return ended.is_set() or self._reactor.seconds() > not_after

        return self._begin(_in_time, late, work, *args, **kwargs)

    def _begin(self, work: Callable[Concatenate[Transaction, P], T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Have ``work`` done in a thread, inside one transaction."""
        if self._pool is None:
            return fail(StoreUnavailable("the store is closed"))
        call: Deferred[T] = self._pool.runInteraction(work, *args, **kwargs)
        return call

    async def _result(self, call: Deferred[T], seconds: float) -> T:
        """Return what comes of ``call``, which goes on to its end however early its caller gives up."""
        waiter: Deferred[T] = Deferred()
        call.addBoth(waiter.callback)
        try:
            return await self._calls.run(waiter, seconds)
        except (sqlite3.Error, ValueError) as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error


def _not_removed(failure: Failure) -> None:
    failure.trap(StoreUnavailable)
    _log.warn("What is kept no longer stays in the store for another day: {error}", error=str(failure.value))


def _configure(connection: sqlite3.Connection, ended: Event) -> None:
    end_with(ended, connection)
    # A commit is on the disk, not only with the kernel, before it is acknowledged: a new key and (worse to
    # lose) a revocation survive a power cut. NORMAL would survive kill -9 only. Writes are rare.
    connection.execute("PRAGMA synchronous = FULL")


def _ping(transaction: Transaction) -> None:
    transaction.execute("SELECT 1 FROM keys LIMIT 1")


def _in_time(
    transaction: Transaction,
    late: Callable[[], bool],
    work: Callable[Concatenate[Transaction, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Do ``work``, which reads and writes, alone, and not at all when it is late."""
    if not late():  # or it would wait for the lock, as may others behind it
        transaction.execute("BEGIN IMMEDIATE")  # not with the first write: nobody else writes after it has read
        result = work(transaction, *args, **kwargs)
        if not late():
            return result
    # Rolled back: the caller has been told that this failed, so nobody was given the key.
    raise StoreUnavailable("the store was closed or too slow")


def _change(transaction: Transaction, tokens: Sequence[str], decide: Decide) -> tuple[Writes, dict[str, Account]]:
    found = {token: key for token in tokens if (key := _get(transaction, token)) is not None}
    writes = decide(found)
    for token in writes.tokens:
        transaction.execute("DELETE FROM keys WHERE token = ?", (name_bytes(token),))
    for key in writes.put:
        alias = None if key.key_alias is None else name_bytes(key.key_alias)
        try:
            transaction.execute(_INSERT, (name_bytes(key.token), alias, dump_row(key), key.created_at))
        except sqlite3.IntegrityError as error:
            raise AliasTaken from error
    spent = usage_sqlite.change(transaction, account_changes(found, writes))
    for entry in writes.audit:
        transaction.execute("INSERT INTO audit (entry) VALUES (?)", (dump_entry(entry),))
    return writes, spent


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


def _list_keys(transaction: Transaction, query: KeyQuery) -> KeyPage:
    transaction.execute("BEGIN")  # one view of the file for all that follows
    if query.is_plain:
        transaction.execute("SELECT count(*) FROM keys")
        (total,) = transaction.fetchone()
        direction = "DESC" if query.descending else "ASC"
        order = f"ORDER BY created {direction}, token {direction} LIMIT ? OFFSET ?"
        transaction.execute(f"SELECT row FROM keys {order}", (query.limit, query.offset))
        return KeyPage(tuple(load_row(row) for (row,) in transaction.fetchall()), total)
    selection = Selection(query)
    transaction.execute("SELECT row FROM keys")
    selection.add(load_row(row) for (row,) in iter(transaction.fetchone, None))
    keys = (_get(transaction, token) for token in selection.page())
    return KeyPage(tuple(key for key in keys if key is not None), len(selection))


def _list_audit(transaction: Transaction, limit: int, before: str | None) -> list[StoredEntry]:
    end = _MAXIMUM_ID if before is None else min(int(before.partition("-")[0]), _MAXIMUM_ID)
    transaction.execute("SELECT id, entry FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?", (end, limit))
    return [StoredEntry(str(id), load_entry(entry)) for id, entry in transaction.fetchall()]
