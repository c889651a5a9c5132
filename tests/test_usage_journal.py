"""The journal: what is written down is there for whoever comes next, once, in the same order."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.logger import LogEvent

from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.journal import Journal, Numbered, journals_in

WANTED = UsageEvent(time=1.0, key="k", prompt_tokens=9, completion_tokens=100, held=5, quality="estimated")
UNREAD = UsageEvent(time=1.0, key="k", quality="unknown")
USED = UsageEvent(time=1.0, key="k", model="m", end_user="ü\n", prompt_tokens=9, spend=3, quality="reported", held=5)


def adopted(path: Path) -> Journal:
    journal = Journal.adopt(path)
    assert journal is not None
    return journal


def test_what_was_begun_and_ended_is_read_again_in_order(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    for id in ("1", "2", "3"):
        journal.begin(id, WANTED)
    journal.end([("2", USED), ("1", WANTED)])
    assert journal.written == 2
    assert journal.open == {"3": WANTED}
    journal.close()
    (path,) = journals_in(tmp_path)
    left = adopted(path)
    assert left.writer == journal.writer
    events = left.read(0, 1, 10)
    assert [(each.number, each.event.quality) for each in events] == [
        (1, "reported"),
        (2, "estimated"),
        (3, "estimated"),
    ]
    assert events[0].event == USED
    assert events[2].event.held == WANTED.held
    assert left.read(events[0].end, 2, 1) == [events[1]]
    assert (left.written, left.open) == (3, {})


def test_adopted_twice_it_gives_the_same_numbers(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    journal.close()
    first = adopted(journal.path)
    events = first.read(0, 1, 10)
    first.close()
    second = adopted(journal.path)
    assert second.read(0, 1, 10) == events
    assert second.written == 1


def test_of_what_nobody_read_nothing_is_estimated(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.begin("1", UNREAD)
    journal.close()
    assert [each.event for each in adopted(journal.path).read(0, 1, 10)] == [UNREAD]


def test_one_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    assert Journal.adopt(journal.path) is None
    assert journal.path.exists()


def test_one_that_another_process_is_done_with_is_not_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed just before it would have been seen, opened, or locked."""
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    journal.close()
    gone = tmp_path / "gone.journal"
    gone.symlink_to(tmp_path / "nowhere")
    assert journals_in(tmp_path) == [gone, journal.path]
    assert Journal.adopt(gone) is None
    lock = fcntl.flock

    def lock_too_late(descriptor: int, how: int) -> None:
        journal.path.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    assert Journal.adopt(journal.path) is None


def test_one_that_is_not_locked_yet_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, seen = fcntl.flock, list[Path]()

    def look_and_lock(descriptor: int, how: int) -> None:
        seen.extend(journals_in(tmp_path))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", look_and_lock)
    journal = Journal.create(tmp_path)
    assert seen == []
    assert list(tmp_path.iterdir()) == [journal.path]


def test_one_with_nothing_in_it_is_removed(tmp_path: Path) -> None:
    (tmp_path / "empty.journal").touch()
    for path in journals_in(tmp_path):
        assert Journal.adopt(path) is None
    assert journals_in(tmp_path) == []


def test_one_that_was_emptied_tells_its_writer_and_no_events(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    for number in range(3):
        journal.begin(str(number), WANTED)
        journal.end([(str(number), USED)])
    journal.close()
    left = adopted(journal.path)
    for _ in range(2):
        left.empty()
        left.close()
        left = adopted(journal.path)
        assert (left.writer, left.written, left.read(0, 1, 10)) == (journal.writer, 0, [])
        assert left.size == journal.path.stat().st_size
    left.remove()
    assert journals_in(tmp_path) == []


@given(cut=st.integers(0, 2000))
def test_wherever_it_was_torn_what_is_whole_counts(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    journal = Journal.create(tmp_path_factory.mktemp("journal"))
    ends = []
    for number in range(5):
        journal.begin(str(number), WANTED)
        begun = journal.size
        journal.end([(str(number), USED)])
        ends.append((begun, journal.size))
    cut = min(cut, journal.size)
    journal.close()
    os.truncate(journal.path, cut)
    left = Journal.adopt(journal.path)
    found = [] if left is None else [each.event.quality for each in left.read(0, 1, 10)]
    assert found.count("reported") == sum(end <= cut for _, end in ends)
    assert found.count("estimated") == sum(begun <= cut < end for begun, end in ends)
    if left is not None:
        left.close()


def test_what_is_written_by_a_newer_version_or_is_rubbish_is_passed_over(
    tmp_path: Path, logged_errors: list[LogEvent]
) -> None:
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    damaged = (
        b"\x00\xff\n",
        b"[]\n",
        b'["-","x",{"unheard_of":1}]\n',
        b'["+",1]\n',
        b"null\n",
        b'["-","x",{"time":1.2e45,"key":"k"}]\n',
        b'["-","x",{"time":NaN,"key":"k"}]\n',
        b'["-","x",{"time":1,"key":"k","prompt_tokens":"1"}]\n',
        b'["-","x",{"time":1,"key":"k","spend":-1}]\n',
        b'["-","x",{"time":1,"key":"k","spend":true}]\n',
        b'["-","x",{"time":1,"key":5}]\n',
        b'["-","x",5]\n',
        b'["+","x",null]\n',
        b'["-","x",{"time":1,"key":"k","quality":"good"}]\n',
        b"[" * 100_000 + b"\n",
    )
    for line in damaged:
        os.write(journal._descriptor, line)
    journal.size = os.fstat(journal._descriptor).st_size
    journal.end([("1", USED)])
    journal.close()
    assert [each.event for each in adopted(journal.path).read(0, 1, 10)] == [USED]
    assert {event["log_format"] for event in logged_errors} == {"{path} has a line that cannot be read"}
    logged_errors.clear()


def test_a_full_disk_is_an_error_and_spoils_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(OSError, match="full"):
        journal.begin("1", WANTED)
    with pytest.raises(OSError, match="full"):
        Journal.create(tmp_path)
    assert list(tmp_path.iterdir()) == [journal.path]
    monkeypatch.undo()
    assert journal.open == {}
    journal.begin("2", WANTED)
    journal.end([("2", USED)])
    journal.close()
    assert [each.event for each in adopted(journal.path).read(0, 1, 10)] == [USED]


def test_what_could_not_be_cut_off_is_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(tmp_path)
    for id in ("1", "2"):
        journal.begin(id, WANTED)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:-7]))
    monkeypatch.setattr(os, "ftruncate", _broken)
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            journal.end([("1", USED), ("2", USED)])
    assert journal.read(0, 1, 10) == []  # the first of them is there whole
    monkeypatch.undo()
    assert journal.written == 0
    journal.end([("1", USED), ("2", USED)])
    assert journal.written == 2
    assert journal.path.read_text().count('["-"') == 2
    journal.close()
    assert [each.event for each in adopted(journal.path).read(0, 1, 10)] == [USED, USED]


def _broken(*_: object) -> None:
    raise OSError("broken")


def test_one_that_was_made_shorter_leaves_out_what_the_store_has_and_numbers_on(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    for id in ("1", "2", "3", "4"):
        journal.begin(id, WANTED)
    journal.end([("1", USED), ("2", USED)])
    since, draft = journal.size, journal.shortened()
    journal.end([("3", USED)])
    behind = journal.size
    journal.give_way(draft, since)
    assert journals_in(tmp_path) == [journal.path]
    assert (journal.size, journal.written, journal.open) == (journal.path.stat().st_size, 3, {"4": WANTED})
    assert journal.read(journal.least, 3, 10) == [Numbered(3, USED, journal.size)]
    assert behind - journal.size == since - journal.least
    journal.end([("4", USED)])
    assert journal.written == 4
    assert Journal.adopt(journal.path) is None  # it is in use still
    journal.close()
    left = adopted(journal.path)
    assert (left.writer, left.before, left.written) == (journal.writer, 2, 4)
    assert [(each.number, each.event) for each in left.read(0, 3, 10)] == [(3, USED), (4, USED)]


def test_a_file_that_cannot_be_closed_well_is_let_go_of_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux has its number free for another file whatever ``close`` says."""
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    close = os.close

    def close_badly(descriptor: int) -> None:
        close(descriptor)
        raise OSError("broken")

    monkeypatch.setattr(os, "close", close_badly)
    journal.give_way(journal.shortened(), journal.size)
    draft = journal.shortened()
    draft.discard()
    monkeypatch.undo()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    journal.end([("1", USED)])
    draft.discard()
    assert os.fstat(other).st_size == 0
    os.close(other)
    journal.close()
    assert [each.event for each in adopted(journal.path).read(0, 1, 10)] == [USED]


def test_a_draft_that_was_left_is_removed_by_who_takes_the_journal_over(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.begin("1", WANTED)
    journal.shortened().close()
    journal.close()
    left = adopted(journal.path)
    assert [path.name for path in tmp_path.iterdir()] == [journal.path.name]
    assert (left.written, left.before) == (1, 0)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    assert Journal.create(tmp_path).path.stat().st_mode & 0o777 == 0o600
