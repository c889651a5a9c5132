"""The access log: what a line says, and that no reader of it can hold the reactor up."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, fields
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger

from vllmproxy.observers import jsonlines
from vllmproxy.observers.jsonlines import BATCH_BYTES, BATCH_SECONDS, BUFFER_BYTES, JsonLines, line_of, open_access_log
from vllmproxy.observers.record import RequestRecord

FULL = RequestRecord(
    time=1795444326.0625,
    request_id="r-1",
    method="POST",
    route="/v1/chat/completions",
    client="10.0.0.9",
    key_id="ab" * 32,
    key_alias="Zoë",
    end_user="u1",
    model="m",
    status=200,
    bytes_in=12,
    bytes_out=345,
    time_to_first_byte=0.0123456789,
    streamed=True,
    duration=1.5,
    prompt_tokens=11,
    completion_tokens=4,
    total_tokens=15,
)


def record(route: str = "/v1/models", request_id: str = "r") -> RequestRecord:
    return RequestRecord(time=0.0, request_id=request_id, method="GET", route=route)


class Writer:
    """Stands in for a descriptor: takes ``most`` bytes a call, or raises ``error``."""

    def __init__(self) -> None:
        self.written = b""
        self.calls = 0
        self.most = 1 << 30
        self.error: OSError | None = None

    def __call__(self, data: bytes) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        taken = data[: self.most]
        self.written += taken
        return len(taken)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.written.splitlines()]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def log(writer: Writer, clock: Clock) -> JsonLines:
    return JsonLines(writer, clock)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the module tells Twisted's log; it is kept from the global publisher."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(jsonlines, "_log", Logger(observer=found.append))
    return found


def test_a_line_has_every_field_that_is_known(log: JsonLines, writer: Writer) -> None:
    log.finished(FULL)
    log.close()
    assert writer.lines() == [
        {
            "time": "2026-11-23T14:32:06.062Z",
            "request_id": "r-1",
            "method": "POST",
            "route": "/v1/chat/completions",
            "client": "10.0.0.9",
            "key_id": "ab" * 32,
            "key_alias": "Zoë",
            "end_user": "u1",
            "model": "m",
            "status": 200,
            "bytes_in": 12,
            "bytes_out": 345,
            "time_to_first_byte": 0.012346,
            "streamed": True,
            "duration": 1.5,
            "prompt_tokens": 11,
            "completion_tokens": 4,
            "total_tokens": 15,
            "ended": "done",
        }
    ]


def test_what_is_not_known_is_left_out(log: JsonLines, writer: Writer) -> None:
    log.finished(record())
    log.close()
    (line,) = writer.lines()
    assert line["time"] == "1970-01-01T00:00:00.000Z"
    assert set(line) == {
        *("time", "request_id", "method", "route", "client", "status"),
        *("bytes_in", "bytes_out", "duration", "ended"),
    }


def test_no_field_is_forgotten(log: JsonLines, writer: Writer) -> None:
    log.finished(evolve(FULL, tokens_estimated=True, error="truncated"))
    log.close()
    (line,) = writer.lines()
    assert list(line) == [field.name for field in fields(RequestRecord)]


@given(
    st.one_of(
        st.floats(-1e9, 1e9), st.integers(0, 10**10).map(lambda tenths: tenths / 1e7), st.sampled_from([0, 1, 1e-3])
    )
)
def test_seconds_are_rounded_to_six_decimals(seconds: float) -> None:
    line = json.loads(line_of(evolve(FULL, duration=seconds, time_to_first_byte=seconds)))
    assert line["time_to_first_byte"] == line["duration"] == round(line["duration"], 6)
    assert abs(line["duration"] - seconds) <= 5e-7 + abs(seconds) * 2.3e-16  # and what a double cannot say


@given(st.text(st.characters(exclude_categories=())), st.binary())
def test_any_route_makes_one_line_of_printable_json(route: str, raw: bytes) -> None:
    writer = Writer()
    log = JsonLines(writer, Clock())
    routes = [route, raw.decode("latin-1"), raw.decode("utf-8", "surrogateescape")]
    for each in routes:
        log.finished(record(each))
    log.close()
    assert writer.written.count(b"\n") == 3
    assert all(0x20 <= byte < 0x7F or byte == 0x0A for byte in writer.written)
    # json pairs up surrogates that were written one by one; nothing else may differ
    assert [line["route"] for line in writer.lines()] == [json.loads(json.dumps(each)) for each in routes]


def test_lines_are_written_together_after_a_moment(log: JsonLines, writer: Writer, clock: Clock) -> None:
    assert clock.getDelayedCalls() == []
    for _ in range(5):
        log.finished(record())
    clock.advance(BATCH_SECONDS * 0.9)
    assert writer.calls == 0
    clock.advance(BATCH_SECONDS * 0.2)
    assert (writer.calls, len(writer.lines())) == (1, 5)
    assert clock.getDelayedCalls() == []


def test_a_full_batch_does_not_wait(log: JsonLines, writer: Writer, clock: Clock) -> None:
    while not writer.calls:
        log.finished(record())
    assert BATCH_BYTES <= len(writer.written) < BATCH_BYTES + 1000
    assert clock.getDelayedCalls() == []


def test_what_is_written_at_once_are_whole_lines(clock: Clock) -> None:
    pieces: list[bytes] = []
    log = JsonLines(pieces.append, clock)
    for number in range(3000):
        log.finished(record("/" + "x" * (number % 97)))
    log.close()
    assert len(pieces) > 3
    assert all(piece.endswith(b"\n") for piece in pieces)


def test_close_flushes_and_is_final(writer: Writer, clock: Clock) -> None:
    closed: list[int] = []
    log = JsonLines(writer, clock, close=lambda: closed.append(1))
    log.finished(record())
    log.close()
    log.close()
    log.finished(record())
    assert (len(writer.lines()), closed, log.dropped) == (1, [1], 1)
    assert clock.getDelayedCalls() == []


def test_a_write_function_that_says_nothing_took_all(clock: Clock) -> None:
    written: list[bytes] = []
    log = JsonLines(written.append, clock)
    for _ in range(2000):
        log.finished(record())
    log.close()
    assert b"".join(written).count(b"\n") == 2000


def test_partial_writes_lose_and_repeat_nothing(log: JsonLines, writer: Writer, clock: Clock) -> None:
    writer.most = 7
    for number in range(20):
        log.finished(record(request_id=str(number)))
    clock.advance(BATCH_SECONDS)
    assert [line["request_id"] for line in writer.lines()] == [str(number) for number in range(20)]


def test_a_stalled_reader_costs_one_try_a_while_and_loses_nothing(
    log: JsonLines, writer: Writer, clock: Clock, events: list[dict[str, Any]]
) -> None:
    writer.error = BlockingIOError()
    for _ in range(2000):  # several batches
        log.finished(record())
    assert writer.calls == 1
    clock.pump([BATCH_SECONDS] * 5)
    assert writer.calls == 6
    writer.error = None
    clock.advance(BATCH_SECONDS)
    assert (len(writer.lines()), log.dropped, events) == (2000, 0, [])
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("error", [BlockingIOError(), BrokenPipeError(32, "Broken pipe"), OSError(28, "No space")])
def test_the_buffer_is_bounded_and_what_is_lost_is_counted_and_said_once(
    log: JsonLines, writer: Writer, clock: Clock, events: list[dict[str, Any]], error: OSError
) -> None:
    writer.error = error
    offered = 0
    while log.dropped < 3:
        log.finished(record("/" + "x" * 100_000))
        offered += 1
        clock.advance(BATCH_SECONDS)
    assert BUFFER_BYTES - 200_000 < offered * 100_000 <= BUFFER_BYTES + 400_000
    assert len(events) == 1
    writer.error = None
    clock.advance(BATCH_SECONDS)
    assert len(writer.lines()) == offered - 3
    assert [event["log_level"].name for event in events] == ["error", "info"]
    log.finished(record())
    clock.advance(BATCH_SECONDS)
    assert len(writer.lines()) == offered - 2


def test_close_counts_what_nobody_took(log: JsonLines, writer: Writer, clock: Clock) -> None:
    writer.error = BlockingIOError()
    for _ in range(4):
        log.finished(record())
    log.close()
    assert log.dropped == 4
    assert clock.getDelayedCalls() == []


def test_a_file_is_appended_to_and_opened_anew(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "access.log"
    path.write_text("before\n")
    log = open_access_log(str(path), clock)
    log.finished(record("/a"))
    rotated = path.rename(tmp_path / "access.log.1")
    log.reopen()
    log.finished(record("/b"))
    log.close()
    before, old = rotated.read_text().splitlines()
    assert (before, json.loads(old)["route"]) == ("before", "/a")
    assert json.loads(path.read_text())["route"] == "/b"
    assert stat.S_IMODE(path.stat().st_mode) & ~0o640 == 0


def test_a_file_that_cannot_be_opened_says_so_at_once(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(OSError, match="No such file"):
        open_access_log(str(tmp_path / "nowhere" / "access.log"), clock)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):  # nobody reads it, and opening it does not wait
        open_access_log(str(tmp_path / "pipe"), clock)


def test_a_failed_reopening_keeps_the_old_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "logs" / "access.log"
    path.parent.mkdir()
    log = open_access_log(str(path), clock)
    moved = path.parent.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        log.reopen()
    log.finished(record("/kept"))
    log.close()
    assert json.loads((moved / "access.log").read_text())["route"] == "/kept"


def test_a_line_torn_by_a_full_disk_does_not_begin_the_next_file(
    writer: Writer, clock: Clock, logged_errors: list[LogEvent]
) -> None:
    def next_file() -> None:
        writer.written, writer.error, writer.most = b"", None, 1 << 30

    def most_then_full(data: bytes) -> int:
        taken = writer(data)
        writer.error = OSError(28, "No space left on device")
        return taken

    log = JsonLines(most_then_full, clock, reopen=next_file)
    log.finished(record("/torn"))
    log.finished(record("/whole"))
    writer.most = 10
    clock.advance(BATCH_SECONDS)
    assert len(writer.written) == 10
    log.reopen()
    log.close()
    assert [line["route"] for line in writer.lines()] == ["/whole"]
    assert log.dropped == 1
    assert [event["log_format"] for event in logged_errors] == [
        "The access log cannot be written: {reason}. Lines will be lost"
    ]
    logged_errors.clear()
