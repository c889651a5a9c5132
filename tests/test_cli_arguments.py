"""The command line, without a proxy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from vllmproxy.cli.arguments import parse
from vllmproxy.cli.fields import FIELDS, fields_of
from vllmproxy.cli.keys import COMMANDS

KEY = "sk-0123456789abcdef"


def fields(*arguments: str) -> dict[str, object]:
    return fields_of(parse(["keys", "create", *arguments]))


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of wrong arguments, whose exit status is 2."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def test_every_field_in_the_api_s_name() -> None:
    text = (
        "--alias bob --models a,b --models b,c --alias-model fast=real --alias-model big=x=y --route /v1/chat,info"
        " --type llm_api --duration 30d --rpm 1 --tpm 2 --parallel 3 --model-rpm a=4 --model-tpm a=5 --max-budget 6.5"
        " --max-budget-tokens 9"
        " --budget-duration 7d --soft-budget 1 --user u --team t --tag x --tag y"
    )
    assert fields(*text.split(), "--metadata", '{"a": [1]}') == {
        "key_alias": "bob",
        "models": ["a", "b", "c"],
        "aliases": {"fast": "real", "big": "x=y"},
        "allowed_routes": ["/v1/chat", "info"],
        "key_type": "llm_api",
        "duration": "30d",
        "rpm_limit": 1,
        "tpm_limit": 2,
        "max_parallel_requests": 3,
        "model_rpm_limit": {"a": 4},
        "model_tpm_limit": {"a": 5},
        "max_budget": 6.5,
        "max_budget_tokens": 9,
        "budget_duration": "7d",
        "soft_budget": 1.0,
        "user_id": "u",
        "team_id": "t",
        "tags": ["x", "y"],
        "metadata": {"a": [1]},
    }
    assert fields() == {}
    assert fields("--rpm", "0") == {"rpm_limit": 0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rpm", "many"],
        ["--alias", ""],
        ["--models", "a,,b"],
        ["--alias-model", "fast"],
        ["--model-rpm", "a=b"],
        ["--max-budget", str(math.nan)],
        ["--max-budget", "1e999"],
        ["--metadata", "[]"],
        ["--metadata", '{"a": NaN}'],
        ["--metadata", "[" * 100_000],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--key", KEY],
        ["stray"],
        ["--alias", "\udc80"],
    ],
)
def test_wrong_values_are_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    said = wrong(capsys, "keys", "create", *arguments)
    assert "usage: vllmproxy" in said
    assert KEY not in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("keys create --rpm many", "argument --rpm: 'many' is not a whole number, like 100"),
        ("keys create --max-budget-tokens 1.5", "argument --max-budget-tokens: '1.5' is not a whole number, like 100"),
        ("keys create --model-tpm m=1k", "argument --model-tpm: '1k' is not a whole number, like 100"),
        ("keys create --max-budget 5$", "argument --max-budget: '5$' is not an amount of money, like 12.5"),
        ("keys create --soft-budget inf", "argument --soft-budget: 'inf' is not an amount of money, like 12.5"),
        ("usage --days week", "argument --days: 'week' is not a number of days, 1 to 36525, like 7"),
        ("usage --days 0", "argument --days: '0' is not a number of days, 1 to 36525, like 7"),
        ("usage --days 36526", "argument --days: '36526' is not a number of days, 1 to 36525, like 7"),
        (
            "usage --timeout 5s",
            "argument --timeout: '5s' is not a number of seconds, more than 0 and at most a day, like 30",
        ),
        (
            "usage --timeout nan",
            "argument --timeout: 'nan' is not a number of seconds, more than 0 and at most a day, like 30",
        ),
    ],
)
def test_what_is_said_of_a_number_is_how_to_write_it(capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    assert wrong(capsys, *line.split()).rstrip().endswith(f"error: {said}")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "keys",
        "keys update bob",
        "keys update bob --rpm 5 --clear rpm_limit",
        "keys update bob --clear key_name",
        "keys delete",
        "keys list --status well",
        "usage --since yesterday",
        "usage --days 0",
        "usage --days 7 --since 2026-11-01",
        "usage --json --csv",
        "usage --by week",
        "usage --by day,day",
    ],
)
def test_wrong_commands_are_wrong_usage(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert "error: " in wrong(capsys, *line.split())


def test_a_complaint_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in wrong(capsys, "keys", "show", "a", "\x1b[2J")


def test_the_proxy_may_be_named_before_the_command_and_after_it() -> None:
    assert parse(["--url", "http://a", "--timeout", "5", "keys", "list"]).url == "http://a"
    assert parse(["keys", "list", "--url", "http://b"]).url == "http://b"
    both = parse(["--url", "http://a", "--timeout", "5", "keys", "list", "--url", "http://b"])
    assert (both.url, both.timeout) == ("http://b", 5.0)


@pytest.mark.parametrize("line", ["", "keys", "keys create", "keys list", "keys rotate", "usage"])
def test_every_command_has_its_help(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([*line.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: vllmproxy {line}".rstrip() in capsys.readouterr().out


def test_every_command_and_every_field_is_documented() -> None:
    text = Path(__file__).parent.parent.joinpath("docs", "cli.rst").read_text()
    assert all(f"``{name}" in text for name in [*COMMANDS, "usage"])
    assert all(f"``{each.option}" in text and f"``{each.field}``" in text for each in FIELDS)


def test_the_command_does_not_start_a_reactor_nor_load_twisted() -> None:
    code = "import json, sys, vllmproxy.cli.main; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert "vllmproxy.cli.client" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("twisted", "klein", "treq")]
