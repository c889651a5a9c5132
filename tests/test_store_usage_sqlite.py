"""What the SQLite store does about usage of its own: what survives, what is one transaction, what is removed."""

import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from _stores import last_usage, say_spent
from attrs import evolve
from twisted.internet import reactor
from twisted.internet.task import Clock

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store import usage_sqlite
from vllmproxy.store.interface import AuditEntry, StoreUnavailable, Writes
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.store.usage_memory import MemoryUsage
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account, UsageQuery, UsageSum

TOKEN = hash_key("sk-one")
EVENT = UsageEvent(time=1_795_521_600.0, key=TOKEN, model="m", end_user="u", spend=1)
KEY = VirtualKey(token=TOKEN, key_name="sk-...-one")
QUERY = UsageQuery(since="2026-11-24", until="2026-11-24")

WRITER = """
import sys
from pathlib import Path
import attrs
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import Writes
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.usage.event import UsageEvent

EVENT = UsageEvent(time=1_795_521_600.0, key=hash_key("sk-one"), model="m", spend=1)
KEY = VirtualKey(token=EVENT.key, key_name="sk-...-one")

async def add():
    store = SqliteStore(Path(sys.argv[1]), reactor)
    await store.open()
    await store.change_keys([], lambda _: Writes((KEY,)))
    last = 0
    while True:
        events = [attrs.evolve(EVENT, end_user=f"u{(last + place) % 900}") for place in range(300)]
        await store.add_usage("w", last + 1, events)
        last += len(events)
        print(last, flush=True)

Deferred.fromCoroutine(add()).addErrback(lambda failure: (failure.printTraceback(), reactor.stop()))
reactor.run()
"""


def write_and_be_killed(path: Path, lines: int) -> int:
    """Have another process add batches of 300, kill it after so many, and return how far it said that it came."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(lines)]
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    return said[-1]


@pytest.mark.parametrize("lines", [1, 4, 9])
@pytest_twisted.ensureDeferred
async def test_kill_9_in_the_middle_of_adding_leaves_whole_batches(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "keys.sqlite3"
    acknowledged = write_and_be_killed(path, lines)
    store = SqliteStore(path, reactor)
    await store.open()
    last = await last_usage(store, "w")
    assert last >= acknowledged
    assert last % 300 == 0
    (found,) = await store.read_usage(QUERY)
    assert found.requests == found.spend == last
    assert await store.read_account(TOKEN) == Account(0, last, 0)
    # Whoever has the journal sends what was not acknowledged, and a little more to be safe.
    await store.add_usage("w", acknowledged - 299, [EVENT] * 900)
    (found,) = await store.read_usage(QUERY)
    assert found.requests == max(last, acknowledged + 600)
    await store.close()


@pytest.mark.parametrize("table", ["usage", "usage_writers", "accounts"])
@pytest_twisted.ensureDeferred
async def test_what_fails_half_way_has_added_nothing(tmp_path: Path, table: str) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    await store.add_usage("w", 1, [EVENT])
    trigger = f"CREATE TRIGGER no_more BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'no more'); END"
    execute(path, trigger)
    with pytest.raises(StoreUnavailable, match="no more"):
        await store.add_usage("w", 2, [EVENT, EVENT])
    execute(path, "DROP TRIGGER no_more")
    (found,) = await store.read_usage(QUERY)
    assert (found.requests, await last_usage(store, "w")) == (1, 1)
    assert await store.read_account(TOKEN) == Account(0, 1, 0)
    await store.add_usage("w", 2, [EVENT, EVENT])
    assert await store.read_account(TOKEN) == Account(0, 3, 0)
    await store.close()


@pytest_twisted.ensureDeferred
async def test_an_account_is_not_set_where_that_cannot_be_written_down(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor)
    await store.open()
    await say_spent(store, TOKEN, 0, 5)
    execute(path, "CREATE TRIGGER no_more BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no more'); END")
    with pytest.raises(StoreUnavailable, match="no more"):
        await say_spent(store, TOKEN, 0, 0, AuditEntry(time=1.0, actor="master", action="/a"))
    assert await store.read_account(TOKEN) == Account(0, 5, 0)
    await store.close()


def execute(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


@pytest_twisted.ensureDeferred
async def test_what_has_failed_for_its_caller_is_not_done_later(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    store = SqliteStore(path, reactor, timeout=0.2)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for call in (store.add_usage("w", 1, [EVENT]), say_spent(store, TOKEN, 0, 5)):
        with pytest.raises(StoreUnavailable, match=r"within 0\.2 s"):
            await call  # its thread still waits for the lock
    other.execute("ROLLBACK")
    other.close()
    await store.close()  # waits for the threads
    again = SqliteStore(path, reactor)
    await again.open()
    assert (await last_usage(again, "w"), await again.read_account(TOKEN)) == (0, Account())
    await again.close()


@pytest_twisted.ensureDeferred
async def test_who_sends_events_again_is_told_of_their_accounts(tmp_path: Path) -> None:
    """It may be that they were added and that the answer was late: then nobody was told of the accounts yet."""
    store = SqliteStore(tmp_path / "keys", reactor)
    await store.open()
    memory = MemoryUsage()
    for _ in range(2):
        told = await store._write(usage_sqlite.add, "w", 1, [EVENT, EVENT], None)
        assert told == memory.add("w", 1, [EVENT, EVENT], None) == {TOKEN: Account(0, 2, 0)}
    await store.close()


@pytest_twisted.ensureDeferred
async def test_sums_of_400_days_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    today = datetime.now(UTC)
    days = [today - timedelta(days=back) for back in (0, 398, 402, 1000)]
    store = SqliteStore(path, reactor)
    await store.open()
    await store.change_keys([], lambda _: Writes((KEY,)))
    for number, day in enumerate(days, 1):
        await store.add_usage("w", number, [UsageEvent(time=day.timestamp(), key=TOKEN, model="m", spend=1)])
    await store.close()
    await store.open()
    with sqlite3.connect(path) as connection:
        for table in ("usage", "usage_names"):
            kept = [day for (day,) in connection.execute(f"SELECT day FROM {table} ORDER BY day")]
            assert kept == [f"{day:%Y-%m-%d}" for day in reversed(days[:2])]
    connection.close()
    assert await store.read_account(TOKEN) == Account(0, 4, 0)
    assert await last_usage(store, "w") == 4
    await store.close()


class Days(Clock):
    """The reactor, at a time that the test says."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


@pytest_twisted.ensureDeferred
async def test_what_is_kept_no_longer_goes_once_a_day(tmp_path: Path) -> None:
    clock = Days()
    clock.advance(EVENT.time)
    store = SqliteStore(tmp_path / "keys", clock)
    await store.open()
    await store.change_keys([], lambda _: Writes((KEY,)))
    deleted = evolve(EVENT, key=hash_key("sk-deleted"))
    await store.add_usage("w", 1, [EVENT, deleted])  # the second was under way when its key was deleted

    async def kept() -> tuple[int, int, int]:
        (found,) = await store.read_usage(QUERY) or [UsageSum()]  # after what goes just now
        return found.requests, *[(await store.read_account(each.key)).spend for each in (EVENT, deleted)]

    assert await kept() == (2, 1, 1)
    clock.advance(86_400)
    assert await kept() == (2, 1, 0)
    clock.advance(399 * 86_400)
    assert await kept() == (0, 1, 0)
    await store.close()
    assert clock.getDelayedCalls() == []


@pytest_twisted.ensureDeferred
async def test_what_cannot_be_removed_just_now_is_removed_the_next_day(tmp_path: Path) -> None:
    clock = Days()
    clock.advance(EVENT.time)
    path = tmp_path / "keys"
    store = SqliteStore(path, clock)
    await store.open()
    await store.add_usage("w", 1, [EVENT])
    execute(path, "CREATE TRIGGER no_more BEFORE DELETE ON accounts BEGIN SELECT RAISE(ABORT, 'no more'); END")
    clock.advance(86_400)
    await store.read_usage(QUERY)
    assert (await store.read_account(TOKEN)).spend == 1
    execute(path, "DROP TRIGGER no_more")
    clock.advance(86_400)
    await store.read_usage(QUERY)
    assert (await store.read_account(TOKEN)).spend == 0
    await store.close()
