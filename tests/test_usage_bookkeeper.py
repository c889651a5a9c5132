"""From the journal to the store: each event once, whatever fails, and nothing held in memory without bound."""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.memory import MemoryStore
from vllmproxy.usage import book, bookkeeper
from vllmproxy.usage.book import Entry
from vllmproxy.usage.bookkeeper import FLUSH_SECONDS, TELL_SECONDS, Bookkeeper, CannotWriteDown
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.journal import Journal, journals_in
from vllmproxy.usage.ledger import Tally, batch_of
from vllmproxy.usage.sums import UsageQuery

EXPECTED = UsageEvent(time=1.0, key="k", prompt_tokens=1000, quality="estimated")
USED = UsageEvent(time=1.0, key="k", prompt_tokens=1, quality="reported")


class Store(MemoryStore):
    """One that can be away, before or after it has done what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None
        self.forgets: str | None = None
        self.refused: str | None = None
        self.calls = 0
        self.sent = 0
        self.stalls: Deferred[None] | None = None

    async def add_usage(
        self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None
    ) -> None:
        self.calls += 1
        self.sent += len(events)
        if self.stalls is not None:
            await self.stalls
        if self.fault == "before":
            raise StoreUnavailable
        if writer == self.refused:
            raise OverflowError("timestamp out of range")
        assert tally is None or tally.batch() == batch_of(events)
        await super().add_usage(writer, first, events, tally)
        if self.fault == "after":
            raise StoreUnavailable

    async def forget_writer(self, writer: str) -> None:
        if self.forgets == "before":
            raise StoreUnavailable
        await super().forget_writer(writer)
        if self.forgets == "after":
            raise StoreUnavailable

    def writers(self) -> set[str]:
        """Those that something is kept of."""
        return set(self._usage._writers)

    def total(self) -> tuple[int, int, int]:
        """Requests, those that are estimated, prompt tokens."""
        sums = self._usage.read(UsageQuery(since="1970-01-01", until="1970-01-02"))
        return (sums[0].requests, sums[0].estimated, sums[0].prompt_tokens) if sums else (0, 0, 0)


class Reactor(Clock):
    """Whose threads do their work at once."""

    def getThreadPool(self) -> Any:
        return self

    def callInThreadWithCallback(self, done: Any, work: Any, *args: Any, **kwargs: Any) -> None:
        done(True, work(*args, **kwargs))

    def callFromThread(self, work: Any, *args: Any, **kwargs: Any) -> None:
        work(*args, **kwargs)


class Desk:
    """A bookkeeper with what is around it."""

    def __init__(self, directory: Path | None, store: Store | None = None, **options: Any) -> None:
        self.clock = Reactor()
        self.store = store or Store()
        Deferred.fromCoroutine(self.store.open())
        self.books = Bookkeeper(self.store, self.clock, directory, **options)
        self.books.open()

    def request(self) -> None:
        self.books.begin(EXPECTED).end(USED)

    def turn(self) -> None:
        self.clock.advance(FLUSH_SECONDS)

    def close(self) -> None:
        Deferred.fromCoroutine(self.books.close())

    def kill(self) -> None:
        """As kill -9 would leave it: descriptors closed, nothing else done."""
        self.books._loop.stop()
        for each in self.books._books:
            each.journal.close()


@pytest.fixture(params=["memory", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "usage"


def test_what_was_used_is_added_in_batches(directory: Path | None) -> None:
    desk = Desk(directory)
    for _ in range(1200):
        desk.request()
    assert desk.store.calls == 0
    desk.turn()
    assert (desk.store.total(), desk.store.calls) == ((1200, 0, 1200), 3)
    desk.turn()
    assert desk.store.calls == 3
    desk.request()
    desk.close()
    assert desk.store.total() == (1201, 0, 1201)
    assert directory is None or journals_in(directory) == []


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_store_that_fails_is_told_again_and_counts_once(directory: Path | None, fault: str) -> None:
    desk = Desk(directory)
    desk.store.fault = fault
    for _ in range(20):
        desk.request()
        desk.turn()
    desk.store.fault = None
    desk.turn()
    assert desk.store.total() == (20, 0, 20)
    desk.close()


def test_where_there_is_no_file_all_of_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "_MOST_PENDING", 7)
    desk = Desk(None)
    for _ in range(50):
        desk.request()
    desk.turn()
    desk.request()
    desk.turn()
    assert desk.store.total() == (51, 0, 51)
    desk.close()
    assert desk.books._books == []


def test_beyond_what_memory_may_hold_the_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "_MOST_PENDING", 7)
    desk = Desk(tmp_path)
    desk.store.fault = "before"
    for _ in range(50):
        desk.request()
    desk.turn()
    assert sum(len(each.events) for each in desk.books._books[0]._pending) == 7
    desk.store.fault = None
    desk.turn()
    desk.request()
    desk.turn()
    assert desk.store.total() == (51, 0, 51)
    desk.close()


@pytest.mark.parametrize("fault", [None, "before", "after"])
def test_killed_and_started_again_each_request_counts_once(tmp_path: Path, fault: str | None) -> None:
    store = Store()
    requests = 0
    for run in range(6):
        desk = Desk(tmp_path, store)
        store.fault = fault
        for _ in range(5):
            desk.request()
        if run % 2:
            desk.turn()
        desk.books.begin(EXPECTED)
        requests += 6
        desk.kill()
        store.fault = None
    last = Desk(tmp_path, store)
    last.turn()
    assert store.total() == (requests, 6, 5 * 6 + 6 * 1000)
    last.close()
    assert journals_in(tmp_path) == []


def test_what_the_store_did_not_get_at_the_end_waits_for_the_next_start(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.store.fault = "before"
    desk.request()
    desk.close()
    desk.store.fault = None
    again = Desk(tmp_path, desk.store)
    again.turn()
    assert desk.store.total() == (1, 0, 1)
    again.close()
    assert (journals_in(tmp_path), desk.store.writers()) == ([], set())


def test_at_the_end_the_writer_is_forgotten(directory: Path | None) -> None:
    desk = Desk(directory)
    desk.request()
    desk.turn()
    assert len(desk.store.writers()) == 1
    desk.close()
    assert desk.store.writers() == set()


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_writer_that_the_store_did_not_forget_is_told_at_the_next_start(tmp_path: Path, fault: str) -> None:
    desk = Desk(tmp_path)
    desk.request()
    desk.store.forgets = fault
    desk.close()
    assert len(journals_in(tmp_path)) == 1
    for forgets in (fault, None):
        desk.store.forgets = forgets
        again = Desk(tmp_path, desk.store)
        again.turn()
        again.close()
    assert (journals_in(tmp_path), desk.store.writers()) == ([], set())
    assert desk.store.total() == (1, 0, 1)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_writer_that_the_store_did_not_forget_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(bookkeeper, "_ROTATE", 1)
    desk = Desk(tmp_path)
    for _ in range(3):
        desk.request()
    desk.store.forgets = fault
    desk.turn()
    desk.turn()
    desk.store.forgets = None
    desk.turn()
    assert (len(journals_in(tmp_path)), len(desk.store.writers())) == (1, 1)
    assert desk.store.total() == (3, 0, 3)
    desk.close()


def test_a_long_journal_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeper, "_ROTATE", 2000)
    desk = Desk(tmp_path)
    long = desk.books.begin(EXPECTED)
    for _ in range(30):
        desk.request()
    assert len(journals_in(tmp_path)) > 1
    desk.turn()
    assert len(journals_in(tmp_path)) == 2  # the newest, and the one that the long request began in
    long.end(USED)
    desk.turn()
    assert len(journals_in(tmp_path)) == 1
    assert desk.store.total() == (31, 0, 31)
    desk.close()


def test_requests_that_go_on_for_long_keep_no_more_than_what_they_are_expected_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each journal would keep all of it; together they would fill the directory."""
    monkeypatch.setattr(bookkeeper, "_ROTATE", 2000)
    monkeypatch.setattr(book, "_SHORTEN", 500)
    desk = Desk(tmp_path, most_bytes=20_000)
    long: list[Entry] = []
    for number in range(1000):
        if len(long) < len(journals_in(tmp_path)):
            long.append(desk.books.begin(EXPECTED))
        desk.request()
        if number % 5 == 0:
            desk.turn()
    desk.turn()
    assert len(long) > 40
    assert sum(path.stat().st_size for path in journals_in(tmp_path)) == desk.books.size < 20_000
    for entry in long[::2]:
        entry.end(USED)
    desk.turn()
    done = len(long[::2])
    assert desk.store.total() == (1000 + done, 0, 1000 + done)
    desk.kill()
    again = Desk(tmp_path, desk.store)
    again.turn()
    left = len(long) - done
    assert desk.store.total() == (1000 + done + left, left, 1000 + done + 1000 * left)
    again.close()
    assert journals_in(tmp_path) == []


def test_what_is_over_while_a_journal_is_made_shorter_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the draft and its taking the place, the disk is waited for."""
    monkeypatch.setattr(bookkeeper, "_ROTATE", 2000)
    monkeypatch.setattr(book, "_SHORTEN", 500)
    desk = Desk(tmp_path)
    first, other = desk.books.begin(EXPECTED), desk.books.begin(EXPECTED)
    sync = Journal.sync

    def end_and_sync(journal: Journal) -> None:
        if journal.before:
            first.end(USED)
        sync(journal)

    for _ in range(30):
        desk.request()
    monkeypatch.setattr(Journal, "sync", end_and_sync)
    desk.turn()
    monkeypatch.undo()
    desk.turn()
    assert desk.store.total() == (31, 0, 31)
    other.end(USED)
    desk.turn()
    assert desk.store.total() == (32, 0, 32)
    desk.close()


def outgrown(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Desk, Entry]:
    """Return a desk, and a request that goes on in a journal which is to be made shorter in the next turn."""
    monkeypatch.setattr(bookkeeper, "_ROTATE", 2000)
    desk = Desk(directory)
    long = desk.books.begin(EXPECTED)
    for _ in range(30):
        desk.request()
    desk.turn()
    monkeypatch.setattr(book, "_SHORTEN", 500)
    return desk, long


@pytest.mark.parametrize("what", ["open", "fdatasync", "rename", "pread", "write"])
def test_a_journal_that_cannot_be_made_shorter_stays_as_it_is(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, long = outgrown(tmp_path, monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(os, what, _full)
        desk.turn()
    assert not list(tmp_path.glob("*.begun"))
    desk.turn()
    assert desk.books.size < 2000 + 500
    long.end(USED)
    desk.turn()
    assert desk.store.total() == (31, 0, 31)
    desk.close()


def test_what_comes_behind_a_shorter_journal_waits_until_the_disk_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    """A power cut would bring back the longer one, and give the numbers of what the store has to other events."""
    desk, long = outgrown(tmp_path, monkeypatch)
    desk.turn()
    assert desk.books.size < 2000 + 500
    long.end(USED)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _full)
        for _ in range(3):
            desk.turn()
    assert desk.store.total() == (30, 0, 30)
    assert [event["log_format"] for event in logged_errors] == ["The disk fails the journal of usage: {error}"]
    logged_errors.clear()
    desk.turn()
    assert desk.store.total() == (31, 0, 31)
    desk.close()


def test_drafts_that_a_killed_process_left_are_removed(tmp_path: Path) -> None:
    used, left, young = (tmp_path / f"{name}.begun" for name in ("used", "left", "young"))
    with used.open("w") as of_another:
        fcntl.flock(of_another, fcntl.LOCK_EX)
        for path in (used, left, young):
            path.write_text('{"writer":"8f3c","before":0}\n')
        for path in (used, left):
            os.utime(path, (1_500_000_000, 1_500_000_000))
        Desk(tmp_path).close()
        assert sorted(tmp_path.glob("*.begun")) == [used, young]


Step = tuple[str, int]
STEPS = st.sampled_from(["begin", "begin", "begin", "end", "end", "turn", "turn", "away", "back", "kill"])


@given(st.lists(st.tuples(STEPS, st.integers(0, 30)), max_size=120))
def test_whatever_happens_each_request_counts_once(tmp_path_factory: pytest.TempPathFactory, steps: list[Step]) -> None:
    """Journals are followed by others, made shorter, killed and taken over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeeper, "_ROTATE", 500)
        patch.setattr(book, "_SHORTEN", 200)
        directory = tmp_path_factory.mktemp("journals")
        desk, begun, killed, under_way = Desk(directory), 0, 0, list[Entry]()
        for step, number in steps:
            if step == "begin":
                under_way.append(desk.books.begin(EXPECTED))
                begun += 1
            elif step == "end" and under_way:
                under_way.pop(number % len(under_way)).end(USED)
            elif step == "turn":
                desk.turn()
            elif step in ("away", "back"):
                desk.store.fault = ("before", "after")[number % 2] if step == "away" else None
            elif step == "kill":
                killed += len(under_way)
                under_way.clear()
                desk.kill()
                desk = Desk(directory, desk.store)
        for entry in under_way:
            entry.end(USED)
        desk.store.fault = None
        desk.turn()
        desk.turn()
        assert desk.store.total() == (begun, killed, begun + 999 * killed)
        desk.close()
        assert journals_in(directory) == []


def test_a_full_journal_takes_no_more_until_the_store_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeper, "_ROTATE", 500)
    desk = Desk(tmp_path, most_bytes=3000)
    desk.store.fault = "before"
    begun = 0

    def fill() -> None:
        nonlocal begun
        while begun < 100:
            desk.request()
            begun += 1

    with pytest.raises(CannotWriteDown):
        fill()
    assert begun > 10
    assert 3000 < desk.books.size < 3000 + 1000
    desk.store.fault = None
    desk.turn()
    desk.request()
    desk.turn()
    assert desk.store.total() == (begun + 1, 0, begun + 1)
    desk.close()


def test_a_disk_that_fails_refuses_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(desk.books._books[0].journal, "begin", fail)
    with pytest.raises(CannotWriteDown, match="no space left"):
        desk.books.begin(EXPECTED)
    desk.close()


def test_what_is_over_in_one_turn_is_written_down_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soon: list[Callable[[], None]] = []
    desk = Desk(tmp_path, soon=soon.append)
    entries = [desk.books.begin(EXPECTED) for _ in range(3)]
    writes: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: (writes.append(data), write(fd, data))[1])
    for entry in entries:
        entry.end(USED)
    assert (len(soon), writes) == (1, [])
    soon.pop()()
    assert [data.count(b"\n") for data in writes] == [3]
    monkeypatch.undo()
    desk.books.begin(EXPECTED).end(USED)
    desk.turn()  # what is brought to the store is written down first, though nothing has left yet
    assert desk.store.total() == (4, 0, 4)
    soon.pop()()
    desk.kill()
    again = Desk(tmp_path, desk.store)
    again.turn()
    assert desk.store.total() == (4, 0, 4)
    again.close()


def test_what_the_disk_did_not_take_is_written_down_later(tmp_path: Path, logged_errors: list[LogEvent]) -> None:
    desk = Desk(tmp_path)
    entries = [desk.books.begin(EXPECTED) for _ in range(3)]
    journal = desk.books._books[0].journal
    end, journal.end = journal.end, _full  # type: ignore[method-assign]
    for entry in entries:
        entry.end(USED)
    assert [event["log_format"] for event in logged_errors] == ["What requests used cannot be written down: {error}"]
    desk.turn()
    assert desk.store.total() == (0, 0, 0)
    journal.end = end  # type: ignore[method-assign]
    desk.turn()
    assert desk.store.total() == (3, 0, 3)
    desk.close()
    assert journals_in(tmp_path) == []
    logged_errors.clear()


def test_what_is_over_after_the_disk_is_mended_is_written_down_though_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    monkeypatch.setattr(bookkeeper, "_ROTATE", 300)
    desk = Desk(tmp_path)
    desk.store.fault = "before"
    for _ in range(5):  # several journals, of which the first waits for the store
        desk.request()
    entry = desk.books.begin(EXPECTED)
    with monkeypatch.context() as full:
        full.setattr(os, "write", _full)
        entry.end(USED)
        desk.turn()
    logged_errors.clear()
    desk.request()
    desk.turn()
    assert sum(path.read_text().count('["-"') for path in journals_in(tmp_path)) == 7
    desk.store.fault = None
    desk.turn()
    assert desk.store.total() == (7, 0, 7)
    desk.close()


def test_a_disk_with_little_room_takes_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    soon: list[Callable[[], None]] = []
    desk = Desk(tmp_path, soon=soon.append)
    for entry in [desk.books.begin(EXPECTED) for _ in range(32)]:
        entry.end(USED)
    write, lines = os.write, 0

    def write_some(fd: int, data: bytes) -> int:
        nonlocal lines
        if lines + data.count(b"\n") > 19:
            raise OSError("no space left")
        lines += data.count(b"\n")
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_some)
    soon.pop()()
    assert lines == 19
    assert len(logged_errors) == 1
    desk.turn()
    assert desk.store.total() == (19, 0, 19)
    monkeypatch.undo()
    desk.turn()
    assert desk.store.total() == (32, 0, 32)
    desk.close()
    logged_errors.clear()


def test_what_is_over_when_all_is_closed_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookkeeper, "_ROTATE", 300)
    soon: list[Callable[[], None]] = []
    desk = Desk(tmp_path, soon=soon.append)
    desk.store.fault = "before"
    entries = [desk.books.begin(EXPECTED) for _ in range(10)]
    assert len(journals_in(tmp_path)) > 1  # the first keeps the others waiting
    for entry in entries:
        entry.end(USED)
    desk.close()
    while soon:
        soon.pop()()
    again = Desk(tmp_path)
    again.turn()
    assert again.store.total() == (10, 0, 10)
    again.close()


def test_a_full_disk_is_not_asked_again_by_each_request_that_is_over(
    tmp_path: Path, logged_errors: list[LogEvent]
) -> None:
    desk = Desk(tmp_path)
    entries = [desk.books.begin(EXPECTED) for _ in range(1000)]
    journal, asked = desk.books._books[0].journal, list[int]()

    def refuse(ended: Sequence[Any]) -> Any:
        asked.append(len(ended))
        raise OSError("full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "end", refuse)
        for entry in entries:
            entry.end(USED)
        assert asked == [1]
        desk.turn()
        assert sum(asked) < 2 * 1000 + 2
    desk.turn()
    assert desk.store.total() == (1000, 0, 1000)
    desk.close()
    logged_errors.clear()


def _full(*_: Any) -> Any:
    raise OSError("no space left")


def test_the_store_is_told_of_nothing_that_a_power_cut_could_take_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be another request's then, and the store would take that for the one it has."""
    desk = Desk(tmp_path)
    desk.books.begin(EXPECTED)
    short = [desk.books.begin(EXPECTED)]
    (journal,) = journals_in(tmp_path)
    kept = b""
    sync = Journal.sync

    def ends_meanwhile(self: Journal) -> None:
        nonlocal kept
        sync(self)
        kept = journal.read_bytes()
        if short:
            short.pop().end(USED)

    with monkeypatch.context() as slow:
        slow.setattr(Journal, "sync", ends_meanwhile)
        desk.turn()
    assert desk.store.total() == (0, 0, 0)
    desk.kill()
    journal.write_bytes(kept)
    later = Desk(tmp_path, desk.store)
    later.turn()
    later.turn()
    assert desk.store.total() == (2, 2, 2000)
    later.close()


def test_what_cannot_be_forced_to_the_disk_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_errors: list[LogEvent]
) -> None:
    desk = Desk(tmp_path)
    desk.request()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", _full)
        for _ in range(3):
            desk.turn()
    assert desk.store.total() == (0, 0, 0)
    assert [event["log_format"] for event in logged_errors] == ["The disk fails the journal of usage: {error}"]
    assert "log_failure" not in logged_errors[0]
    logged_errors.clear()
    desk.turn()
    assert desk.store.total() == (1, 0, 1)
    desk.close()


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_file_system_that_knows_of_no_disk_is_not_waited_for(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, call, unknown)
    desk = Desk(tmp_path)
    desk.request()
    desk.turn()
    assert desk.store.total() == (1, 0, 1)
    desk.close()


def test_a_journal_that_cannot_be_added_keeps_no_other_waiting(tmp_path: Path, logged_errors: list[LogEvent]) -> None:
    left = Desk(tmp_path)
    left.request()
    left.kill()
    store = Store()
    desk = Desk(tmp_path, store)
    (writer,) = {book.journal.writer for book in desk.books._books[:-1]}
    store.refused = writer
    desk.request()
    desk.turn()
    desk.turn()
    assert store.total() == (1, 0, 1)
    assert len(logged_errors) == 1
    store.refused = None
    desk.turn()
    assert store.total() == (2, 0, 2)
    desk.close()
    logged_errors.clear()


def test_who_waits_until_all_is_told(directory: Path | None) -> None:
    desk = Desk(directory)
    desk.request()
    told = desk.books.tell()
    assert told.called
    assert desk.store.total() == (1, 0, 1)
    assert len(desk.clock.getDelayedCalls()) == 1  # the next batch


@pytest.mark.parametrize("leaves", [False, True])
def test_who_waits_for_that_waits_for_so_long_and_may_leave(directory: Path | None, leaves: bool) -> None:
    desk = Desk(directory)
    desk.request()
    desk.store.stalls = Deferred()
    ends: list[Any] = []
    told = desk.books.tell().addBoth(ends.append)
    if leaves:
        told.cancel()
        assert ends[0].check(CancelledError)
    else:
        desk.clock.advance(TELL_SECONDS)
        assert ends == [None]
    desk.store.stalls.callback(None)  # nobody has cancelled that
    assert desk.store.total() == (1, 0, 1)
    assert len(ends) == 1
