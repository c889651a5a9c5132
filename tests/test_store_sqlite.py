"""The SQLite store's own promises: the file, its modes, its version, and what survives."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytest_twisted
from _reactor import until
from _stores import add_key, delete_keys, hold_commits, last_usage, update_key
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.internet.task import deferLater

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.limits.values import Ask, Granted, Rule
from vllmproxy.store import sqlite
from vllmproxy.store.interface import AuditEntry, CannotOpenStore, StoreUnavailable, Writes
from vllmproxy.store.listing import KeyQuery
from vllmproxy.store.rows import load_row
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.store.sqlite_schema import BUSY_SECONDS
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account

KEY = VirtualKey(token=hash_key("sk-one"), key_name="sk-...-one", key_alias="one")
NOBODY = 65534

WRITER = """
import sys
from pathlib import Path
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import Writes
from vllmproxy.store.sqlite import SqliteStore

async def add():
    store = SqliteStore(Path(sys.argv[1]), reactor)
    await store.open()
    key = VirtualKey(token=hash_key("sk-one"), key_name="sk-...-one", key_alias="one")
    await store.change_keys([], lambda _: Writes(put=(key,)))
    print("added", flush=True)

# Begun before the reactor runs, as a service may be.
Deferred.fromCoroutine(add()).addErrback(lambda failure: (failure.printTraceback(), reactor.stop()))
reactor.run()
"""


def write_and_be_killed(path: Path) -> None:
    """Have another process add KEY to ``path``, and kill it the moment that it says so."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        line = writer.stdout.readline()
        writer.kill()
    assert line == b"added\n"
    assert writer.returncode == -signal.SIGKILL


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def first_release(path: Path, keys: int = 20) -> None:
    """Write a file as the first release did."""
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE keys (token BLOB PRIMARY KEY, alias BLOB UNIQUE, row TEXT NOT NULL) WITHOUT ROWID"
        )
        connection.execute("PRAGMA user_version = 1")
        for number in range(keys):
            token = hash_key(f"k{number}")
            fields = {"token": token, "key_name": f"k{number}", "key_alias": f"a{number}", "created_at": 5.5 + number}
            row = json.dumps({**fields, "metadata": {"lone": "\ud800"}, "tags": ["t"], "blocked": True})
            connection.execute("INSERT INTO keys VALUES (?, ?, ?)", (token.encode(), b"a%d" % number, row))
        connection.execute("INSERT INTO keys VALUES (x'00', NULL, 'no json')")
    connection.close()


async def refusal(path: Path) -> str:
    """Return why ``path`` cannot be opened; no thread is left over from trying."""
    before = threading.active_count()
    store = SqliteStore(path, reactor)
    with pytest.raises(CannotOpenStore) as caught:
        await store.open()
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest_twisted.ensureDeferred
async def test_file_and_directory_are_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys.sqlite3"
    old = os.umask(0)
    try:
        store = SqliteStore(path, reactor)
        await store.open()
        await add_key(store, KEY)
        files = {each.name: mode(each) for each in path.parent.iterdir()}
        await store.close()
    finally:
        os.umask(old)
    assert mode(path.parent) == 0o700
    assert files == dict.fromkeys(["keys.sqlite3", "keys.sqlite3-wal", "keys.sqlite3-shm"], 0o600)


@pytest_twisted.ensureDeferred
async def test_threads_end_with_close(tmp_path: Path) -> None:
    before = threading.active_count()
    store = SqliteStore(tmp_path / "keys", reactor)
    await store.open()
    await DeferredList([Deferred.fromCoroutine(store.ping()) for _ in range(20)])
    assert threading.active_count() > before
    await store.close()
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile


@pytest_twisted.ensureDeferred
async def test_closing_waits_for_no_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = SqliteStore(tmp_path / "keys", reactor), list[str]()
    await store.open()
    keys = tuple(VirtualKey(token=hash_key(str(number)), key_name="k") for number in range(5000))
    await store.change_keys([], lambda _: Writes(put=keys))
    monkeypatch.setattr(sqlite, "load_row", lambda row: read.append(row) or load_row(row))
    listing = Deferred.fromCoroutine(store.list_keys(KeyQuery(search="nothing")))
    await store.close()  # waits for the thread
    assert len(read) < 5000
    with pytest.raises(StoreUnavailable, match="closed"):
        await listing


@pytest_twisted.ensureDeferred
async def test_closing_waits_for_the_lock_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    changes = [Deferred.fromCoroutine(delete_keys(store, [KEY.token])) for _ in range(30)]
    began = time.monotonic()
    await store.close()
    took = time.monotonic() - began
    other.close()
    for success, result in await DeferredList(changes, consumeErrors=True):
        assert (success, result.type) == (False, StoreUnavailable)
    assert took < 5 * BUSY_SECONDS  # three at a time, it would be ten


@pytest_twisted.ensureDeferred
async def test_an_acknowledged_key_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "keys.sqlite3"
    write_and_be_killed(path)
    store = SqliteStore(path, reactor)
    await store.open()
    assert await store.get_key(KEY.token) == KEY
    await store.close()


@pytest_twisted.ensureDeferred
async def test_commits_are_on_the_disk_before_they_are_acknowledged(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "keys", reactor)
    await store.open()

    def pragmas(transaction: sqlite3.Cursor) -> list[object]:
        names = ("journal_mode", "synchronous", "user_version")
        return [transaction.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await store._run(pragmas) == ["wal", 2, 3]
    await store.close()


@pytest_twisted.ensureDeferred
async def test_several_may_open_a_new_file_at_once_and_share_it(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "new" / "keys", reactor) for _ in range(6)]
    opened = await DeferredList([Deferred.fromCoroutine(store.open()) for store in stores], consumeErrors=True)
    assert [success for success, _ in opened] == [True] * 6, opened
    await add_key(stores[0], KEY)
    assert [await store.get_key(KEY.token) for store in stores] == [KEY] * 6
    assert await delete_keys(stores[1], [KEY.token]) == [KEY.token]
    assert [await store.get_key(KEY.token) for store in stores] == [None] * 6
    for store in stores:
        await store.close()


@pytest_twisted.ensureDeferred
async def test_another_schema_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE keys (other)")
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    reason = await refusal(path)
    assert "version 99" in reason
    assert "--store" in reason
    assert path.read_bytes() == content


@pytest_twisted.ensureDeferred
async def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pictures (name)")
    connection.close()
    assert "version 0" in await refusal(path)


@pytest_twisted.ensureDeferred
async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 1000)
    assert "not a database" in await refusal(path)
    assert path.read_text() == "not a database " * 1000


@pytest_twisted.ensureDeferred
async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    for number in range(200):
        await add_key(store, VirtualKey(token=hash_key(str(number)), key_name="k", user_id="u" * 500))
    await store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x55" * (len(content) - 4096)
    path.write_bytes(content)
    await refusal(path)


@pytest_twisted.ensureDeferred
async def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "directory" in await refusal(tmp_path)
    (tmp_path / "file").touch()
    await refusal(tmp_path / "file" / "keys")


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Return a directory that is readable, not writable, to who the test runs as: nobody, if it was root."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        yield directory
        if os.getuid() == 0:
            os.seteuid(0)
        directory.chmod(0o700)


def drop_privileges(directory: Path) -> None:
    directory.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(NOBODY)


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_written_is_refused(unprivileged: Path) -> None:
    path = unprivileged / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    await store.close()
    path.chmod(0o444)
    drop_privileges(unprivileged)
    assert "readonly database" in await refusal(path)
    assert "Permission denied" in await refusal(unprivileged / "new")
    assert "Permission denied" in await refusal(unprivileged / "state" / "new")


@pytest_twisted.ensureDeferred
async def test_a_writer_elsewhere_delays_no_lookup_and_ends_an_add_in_time(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    await add_key(store, KEY)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    late = VirtualKey(token=hash_key("sk-late"), key_name="sk-...late")
    with pytest.raises(StoreUnavailable, match="locked"):
        await add_key(store, late)
    assert await store.get_key(KEY.token) == KEY
    other.execute("ROLLBACK")
    other.close()
    assert await store.get_key(late.token) is None
    await add_key(store, late)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_an_add_that_has_failed_for_its_caller_is_not_done_later(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor, timeout=0.2)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
        await add_key(store, KEY)  # its thread still waits for the lock
    other.execute("ROLLBACK")
    other.close()
    await store.close()  # waits for the thread
    again = SqliteStore(path, reactor)
    await again.open()
    assert await again.get_key(KEY.token) is None
    await again.close()


@pytest.mark.parametrize("gives_up", ["the caller", "the deadline"])
@pytest_twisted.ensureDeferred
async def test_a_change_that_is_done_after_all_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gives_up: str
) -> None:
    commits = hold_commits(monkeypatch)
    commits.set()
    heard: list[str | None] = []
    store = SqliteStore(tmp_path / "keys", reactor, timeout=0.3)
    store.watch_keys(heard.append)
    await store.open()
    limiter = store.limiter(reactor)
    budget = Rule("budget", "", 10, 10)
    await add_key(store, KEY)
    await store.add_usage("w", 1, [UsageEvent(time=0.0, key=KEY.token, spend=5)])
    assert not isinstance(await maybeDeferred(limiter.reserve, Ask(KEY.token, "1", (budget,))), Granted)
    heard.clear()
    commits.clear()
    call = Deferred.fromCoroutine(delete_keys(store, [KEY.token]))
    await deferLater(reactor, 0.1)
    if gives_up == "the caller":
        call.cancel()
    with pytest.raises(CancelledError if gives_up == "the caller" else StoreUnavailable):
        await call
    assert await store.get_key(KEY.token) == KEY
    assert heard == []
    commits.set()
    await until(lambda: heard == [KEY.token], 5)
    assert await store.get_key(KEY.token) is None
    assert isinstance(await maybeDeferred(limiter.reserve, Ask(KEY.token, "2", (budget,))), Granted)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_an_unreadable_row_is_not_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO keys VALUES (?, NULL, '{}', 0)", (KEY.token.encode(),))
    other.close()
    with pytest.raises(StoreUnavailable):
        await store.get_key(KEY.token)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_version_1_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first_release(path)
    stores = [SqliteStore(path, reactor) for _ in range(3)]
    await DeferredList([Deferred.fromCoroutine(store.open()) for store in stores], fireOnOneErrback=True)
    store = stores[0]
    page = await store.list_keys(KeyQuery(limit=3))
    assert ([key.key_name for key in page.keys], page.total) == (["k19", "k18", "k17"], 21)
    key = await store.get_key(hash_key("k7"))
    assert key is not None
    assert (key.blocked, key.tags, key.created_at, key.metadata) == (True, ("t",), 12.5, {"lone": "\ud800"})
    assert (key.key_type, key.allowed_routes) == ("default", ())
    await store.add_audit(AuditEntry(time=1.0, actor="master", action="/key/delete"))
    assert await delete_keys(store, [key.token]) == [key.token]
    assert await stores[1].find_aliases(["a7", "a8"]) == {"a8": hash_key("k8")}
    for each in stores:
        await each.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
        assert connection.execute("SELECT row FROM keys WHERE token = x'00'").fetchone() == ("no json",)
    connection.close()


@pytest_twisted.ensureDeferred
async def test_opening_takes_as_long_as_it_does(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first_release(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = SqliteStore(path, reactor, timeout=0.1)
    reactor.callLater(0.5, other.execute, "ROLLBACK")
    await store.open()
    other.close()
    assert await store.get_key(hash_key("k7")) is not None
    await store.close()


@pytest_twisted.ensureDeferred
async def test_an_opening_that_is_given_up_ends_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first_release(path, 5000)
    content = path.read_bytes()
    store, before = SqliteStore(path, reactor), threading.active_count()
    opening = Deferred.fromCoroutine(store.open())
    opening.cancel()
    with pytest.raises(CancelledError):
        await opening
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile
    await store.close()
    assert path.read_bytes() == content


def second_release(path: Path) -> None:
    """Write a file as the second release did."""
    first_release(path)
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE keys ADD COLUMN created REAL NOT NULL DEFAULT 0")
        connection.execute("UPDATE keys SET created = 7")
        connection.execute("CREATE INDEX keys_by_time ON keys (created, token)")
        connection.execute("CREATE TABLE audit (id INTEGER PRIMARY KEY AUTOINCREMENT, entry TEXT NOT NULL)")
        connection.execute('INSERT INTO audit (entry) VALUES (\'{"action":"/key/update"}\')')
        connection.execute("PRAGMA user_version = 2")
    connection.close()


@pytest.mark.parametrize("release", [first_release, second_release])
@pytest_twisted.ensureDeferred
async def test_usage_can_be_added_to_an_older_file(tmp_path: Path, release: Callable[[Path], None]) -> None:
    path = tmp_path / "keys"
    release(path)
    stores = [SqliteStore(path, reactor) for _ in range(3)]
    await DeferredList([Deferred.fromCoroutine(store.open()) for store in stores], fireOnOneErrback=True)
    key = await stores[0].get_key(hash_key("k7"))
    assert key is not None
    assert await stores[0].read_account(key.token) == Account()
    assert len(await stores[0].list_audit(9)) == (release is second_release)
    event = UsageEvent(time=86_400.0, key=key.token, spend=5)
    await stores[1].add_usage("w", 1, [event])
    assert await stores[2].read_account(key.token) == Account(0, 5, 0)
    assert await last_usage(stores[2], "w") == 1
    for store in stores:
        await store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    connection.close()


@pytest_twisted.ensureDeferred
async def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first_release(path)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE audit (somebody_elses)")
    connection.close()
    content = path.read_bytes()
    assert "audit" in await refusal(path)
    assert path.read_bytes() == content


@pytest_twisted.ensureDeferred
async def test_the_audit_trail_can_only_grow(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    await store.add_audit(AuditEntry(time=1.0, actor="master", action="/key/delete"))
    with sqlite3.connect(path) as other:
        for statement in ("DELETE FROM audit", "UPDATE audit SET entry = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                other.execute(statement)
    other.close()
    assert len(await store.list_audit(10)) == 1
    await store.close()


@pytest_twisted.ensureDeferred
async def test_what_another_version_keeps_of_a_key_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    row = json.dumps({"token": KEY.token, "key_name": "n", "newer": [1]})
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO keys VALUES (?, NULL, ?, 0)", (KEY.token.encode(), row))
    with pytest.raises(StoreUnavailable, match="newer"):
        await update_key(store, KEY.token, lambda key: key)
    assert other.execute("SELECT row FROM keys").fetchall() == [(row,)]
    other.close()
    await store.close()
