"""``vllmproxy usage`` against a server that answers as ``GET /usage`` does."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from _cli import Asked, FakeServer, Said, fake_server, in_terminal, vllmproxy, without_styles
from attrs import define
from rich.cells import cell_len

ALICE = "a" * 64
NUMBERS = {
    "requests": 12_345,
    "estimated_requests": 2,
    "unknown_requests": 0,
    "prompt_tokens": 123_456_789,
    "completion_tokens": 23_456_789,
    "total_tokens": 146_913_578,
    "cached_prompt_tokens": 5,
    "audio_seconds": 12.5,
    "spend": 12.345678,
}
EVIL = "\x1b]0;owned\x07[bold]evil[/bold]"
ROWS: list[dict[str, Any]] = [
    {
        "day": "2026-11-24",
        "key": ALICE,
        "key_alias": "alice",
        "model": "qwen2.5-7b-instruct",
        "end_user": "customer-17",
    },
    {"day": "2026-11-24", "key": "b" * 64, "key_alias": None, "model": "Qwen/Qwen3-Embedding-8B", "end_user": ""},
    {"day": "2026-11-25", "key": "master", "model": "", "end_user": EVIL},
]
ANSWER = {
    "since": "2026-11-24",
    "until": "2026-11-25",
    "group_by": ["day", "key", "model", "end_user"],
    "usage": [row | NUMBERS for row in ROWS],
    "total": {name: value * len(ROWS) for name, value in NUMBERS.items()},
}
TITLES = ("DAY", "KEY", "MODEL", "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "TOTAL", "AUDIO", "SPEND")
CSV = "day,model,requests\r\n2026-11-24,\x1b[31mred,5\r\n"


@define
class Usage:
    """A server whose next answer is ``said``."""

    said: Said
    server: FakeServer

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def query(self) -> dict[str, str]:
        """What was asked last."""
        (asked,) = self.server.asked[-1:]
        assert (asked.method, asked.path) == ("GET", "/usage")
        return asked.query


@pytest.fixture
def usage() -> Iterator[Usage]:
    def answer(asked: Asked) -> Said:
        return usage.said

    with fake_server(answer) as server:
        usage = Usage(Said(ANSWER), server)
        yield usage


def test_what_is_asked(usage: Usage) -> None:
    assert vllmproxy("usage", url=usage.url).status == 0
    assert usage.query == {"group_by": "day"}
    line = "usage --since 2026-11-01 --until 2026-11-30 --key alice --model m --end-user u --by key,end-user"
    assert vllmproxy(*line.split(), url=usage.url).status == 0
    assert usage.query == {
        "since": "2026-11-01",
        "until": "2026-11-30",
        "key_alias": "alice",
        "model": "m",
        "end_user": "u",
        "group_by": "key,end_user",
    }
    vllmproxy("usage", "--key", ALICE, url=usage.url)
    assert usage.query["key"] == ALICE
    vllmproxy("usage", "--key", "-", url=usage.url, stdin="sk-a-key-of-my-own-17")
    assert len(usage.query["key"]) == 64
    assert not [asked for asked in usage.server.asked if "sk-a-key" in asked.target]


def test_the_last_days_end_today(usage: Usage) -> None:
    before = datetime.now(UTC).date()
    vllmproxy("usage", "--days", "7", url=usage.url)
    days = {(str(day - timedelta(days=6)), str(day)) for day in (before, datetime.now(UTC).date())}
    assert (usage.query["since"], usage.query["until"]) in days


def test_the_table(usage: Usage) -> None:
    shown = vllmproxy("usage", "--by", "day,key,model", url=usage.url)
    assert (shown.status, shown.err) == (0, "")
    heading, _, titles, *rows, total, _, remark = shown.out.splitlines()
    assert heading == "Usage from 2026-11-24 to 2026-11-25 (UTC)"
    assert titles.replace("AUDIO S", "AUDIO").replace("DAY (UTC)", "DAY").split() == list(TITLES)
    numbers = ["12,345", "123,456,789", "5", "23,456,789", "146,913,578", "12.5", "12.3457"]
    assert [row.split() for row in rows] == [
        ["2026-11-24", "alice", "qwen2.5-7b-instruct", *numbers],
        ["2026-11-24", f"{'b' * 16}...", "Qwen/Qwen3-Embedding-8B", *numbers],
        ["2026-11-25", "master", "-", *numbers],
    ]
    assert total.split()[:2] == ["Total", "37,035"]
    assert len({len(row) for row in (titles, *rows, total)}) == 1  # the numbers stand at the right
    assert remark == "Requests whose tokens are estimated: 6."


def test_the_hash_of_a_key_that_is_no_more_is_whole_where_there_is_room(usage: Usage) -> None:
    shown = vllmproxy("usage", "--by", "key", "--wide", url=usage.url).out
    assert f"{'b' * 64} " in shown
    assert vllmproxy("usage", "--key", "b" * 64, url=usage.url).status == 0


def test_columns_without_numbers_are_left_out_and_unknown_use_is_told(usage: Usage) -> None:
    nothing = {"cached_prompt_tokens": 0, "audio_seconds": 0.0, "spend": 0.0, "estimated_requests": 0}
    row = {"model": "m", **NUMBERS, **nothing, "unknown_requests": 1}
    usage.said = Said({**ANSWER, "usage": [row], "total": row})
    out = vllmproxy("usage", "--by", "model", url=usage.url).out
    assert out.splitlines()[2].split() == ["MODEL", "REQUESTS", "PROMPT", "COMPLETION", "TOTAL"]
    assert out.splitlines()[-1] == "Requests that used what nobody could read, and is not in the sums: 1."


@pytest.mark.parametrize(("columns", "by"), [(80, "day,key"), (80, "key,end-user"), (120, "day,key,model,end-user")])
def test_the_table_fits_its_terminal_and_numbers_are_whole(usage: Usage, columns: int, by: str) -> None:
    shown = in_terminal("usage", "--by", by, url=usage.url, columns=columns)
    text = without_styles(shown.out)
    assert shown.status == 0
    assert max(map(cell_len, text.splitlines())) <= columns
    assert text.count("123,456,789") == len(ROWS)
    assert "\x1b" not in text
    assert "\x07" not in text


def test_text_of_others_cannot_reach_the_terminal(usage: Usage) -> None:
    out = vllmproxy("usage", "--by", "end-user", url=usage.url).out
    assert "\\x1b]0;owned\\x07[bold]evil[/bold]" in out
    assert "\x1b" not in out
    assert "\x1b" not in vllmproxy("usage", "--json", url=usage.url).out


def test_nothing_was_used(usage: Usage) -> None:
    usage.said = Said({**ANSWER, "usage": [], "total": dict.fromkeys(NUMBERS, 0)})
    assert vllmproxy("usage", url=usage.url).out == "No usage from 2026-11-24 to 2026-11-25 (UTC).\n"
    assert vllmproxy("usage", "--json", url=usage.url).json["usage"] == []


def test_json_is_the_answer(usage: Usage) -> None:
    assert vllmproxy("usage", "--json", url=usage.url).json == ANSWER


def test_csv_is_passed_on_and_made_fit_for_a_terminal_only(usage: Usage) -> None:
    usage.said = Said(CSV.encode(), content_type="text/csv; charset=utf-8")
    shown = vllmproxy("usage", "--csv", url=usage.url)
    assert usage.query == {"group_by": "day", "format": "csv"}
    assert shown.out == CSV
    assert in_terminal("usage", "--csv", url=usage.url, columns=80).out == (
        "day,model,requests\n2026-11-24,\\x1b[31mred,5\n"
    )
    usage.said = Said(b"<html>", content_type="text/html")
    assert "is it the proxy?" in vllmproxy("usage", "--csv", url=usage.url).failure
    usage.said = Said({"error": {"message": "since is no day."}}, status=400)
    assert vllmproxy("usage", "--csv", url=usage.url).failure == "since is no day."


@pytest.mark.parametrize("body", [{}, {"usage": []}, {"usage": [1], "total": {}}, {"usage": {}, "total": {}}])
def test_an_answer_that_is_none(usage: Usage, body: Any) -> None:
    usage.said = Said(body)
    assert "does not answer as vllmproxy does" in vllmproxy("usage", url=usage.url).failure
