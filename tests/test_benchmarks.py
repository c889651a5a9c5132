"""The benchmark's report says what was measured, and nothing about speed is judged here."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from _report import number, report
from _rows import Bar

ENVIRONMENT = {
    "date": "today",
    "commit": "abc",
    "machine": "one",
    "took": "1 minute",
    "rounds": "3",
    "Python": "3.11.7",
}


def _results(**changes: Any) -> dict[str, Any]:
    """Return the result of a run of three contestants, with the vllm-router at 100 µs a request."""
    figures = {
        "requests": {
            "direct": {"cpu": [0.0], "rate": [60_000.0], "proxy core": [0.0], "load core": [1.0]},
            "vllm-router": {"cpu": [90.0, 100.0, 500.0], "rate": [9_000.0], "proxy core": [0.99], "load core": [0.4]},
            "vllmproxy-on": {"cpu": [50.0], "rate": [20_000.0], "proxy core": [0.8], "load core": [0.97]},
        },
        "latency": {
            "direct": {"p50": [30.0], "p99": [60.0]},
            "vllm-router": {"p50": [230.0], "p99": [460.0]},
            "vllmproxy-on": {"p50": [130.0], "p99": [1_460.0]},
        },
        "limits": {
            "1 limit": {"cpu": [100.0]},
            "20 limits": {"cpu": [120.0]},
            "20 limits and a budget": {"cpu": [110.0]},
        },
    }
    whole = {
        "environment": ENVIRONMENT,
        "quick": False,
        "contestants": ["direct", "vllm-router", "vllmproxy-on"],
        "missing": {"litellm": "pip cannot install it"},
        "figures": figures,
        "left out": {"burst": {"vllmproxy-on": "round 1 failed"}},
    }
    return {**whole, **changes}


def _line(text: str, beginning: str) -> list[str]:
    """Return the cells of the first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {beginning}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_bar_is_for_the_ratio_of_medians() -> None:
    cells = _line(report(_results()), "CPU per small POST, µs")
    bar = "≤ 0.9 \N{MULTIPLICATION SIGN} vllm-router"
    assert cells[1:] == ["50.0", "", "0.50", "", "", bar, "yes", "not measured"]


def test_a_bar_of_the_router_is_looked_at_beside_its_default_policy_too() -> None:
    results = _results()
    results["figures"]["requests"]["vllm-router-default"] = {"cpu": [55.0]}
    assert _line(report(results), "CPU per small POST, µs")[-2:] == ["yes", "**no**"]


def test_latency_counts_from_direct() -> None:
    text = report(_results())
    assert _line(text, "added latency, one connection, p50")[1:4] == ["100", "", "0.50"]
    assert _line(text, "added latency, one connection, p99")[-2] == "**no**"


def test_what_grows_is_compared_with_where_it_began() -> None:
    cells = _line(report(_results()), "CPU per small POST by limits")
    assert cells[1] == "120; 1.20 \N{MULTIPLICATION SIGN}"
    assert cells[-2] == "**no**"


def test_variants_are_compared_round_by_round() -> None:
    results = _results()
    results["figures"]["limits"] = {"1 limit": {"cpu": [100.0, 200.0, 400.0]}, "20 limits": {"cpu": [130.0, 210, 410]}}
    cells = _line(report(results), "CPU per small POST by limits")
    assert cells[1] == "210 (130 to 410); 1.05 \N{MULTIPLICATION SIGN}"
    assert cells[-2] == "yes"


def test_rounds_that_are_missing_are_not_paired_with_others() -> None:
    results = _results()
    results["figures"]["limits"] = {"1 limit": {"cpu": [100.0, 100.0]}, "20 limits": {"cpu": [100.0, 150.0, 200.0]}}
    cells = _line(report(results), "CPU per small POST by limits")
    assert cells[1] == "150 (100 to 200)"
    assert cells[-2] == "**no**"


def test_what_the_rounds_gave_is_shown() -> None:
    results = _results()
    results["figures"]["requests"]["vllmproxy-on"]["cpu"] = [50.0, 40.0, 70.0]
    results["figures"]["latency"] = {
        "direct": {"p50": [30.0, 50.0], "p99": [60.0, 60.0]},
        "vllmproxy-on": {"p50": [130.0, 170.0], "p99": [160.0, 260.0]},
    }
    text = report(results)
    assert _line(text, "CPU per small POST, µs")[1] == "50.0 (40.0 to 70.0)"
    assert _line(text, "added latency, one connection, p50")[1] == "110 (100 to 120)"


def test_a_small_part_is_a_fraction() -> None:
    results = _results()
    results["figures"]["requests"]["litellm"] = {"cpu": [5_000.0], "rate": [100.0]}
    assert _line(report(results), "CPU per small POST, µs")[5] == "1/100"


def test_a_peer_that_the_load_limited_is_marked_beside_its_ratio() -> None:
    results = _results()
    results["figures"]["requests"]["vllm-router"] |= {"proxy core": [0.6], "load core": [0.99]}
    assert _line(report(results), "requests a second")[3] == "2.22 †"


def test_a_figure_that_two_bars_are_for_is_shown_once() -> None:
    bars, growth = report(_results()).split("## As work grows")
    assert _line(bars, "… with a budget, too")[-2] == "yes"
    assert growth.count("| 100 | 120 | 110 |") == 1


def test_a_rate_that_the_load_limited_is_marked() -> None:
    text = report(_results())
    _, figures = text.split("## Figures")
    assert _line(figures, "requests a second")[1:] == ["60,000 †", "9,000", "20,000 †"]
    assert "† The load generator" in text
    assert "‡ Neither" not in text


def test_what_was_not_measured_is_said() -> None:
    text = report(_results())
    assert _line(text, "events a second, burst")[-2] == "not measured"
    assert "- LiteLLM: pip cannot install it." in text
    assert "- burst, vllmproxy, all on: round 1 failed." in text


def test_measures_that_were_not_asked_for_are_no_rows() -> None:
    assert "upload" not in report(_results())


@pytest.mark.parametrize(
    ("bar", "value", "other", "met"),
    [
        (Bar(24), 24.0, None, True),
        (Bar(24), 24.1, None, False),
        (Bar(0.8, least=True, of="nginx"), 80.0, 100.0, True),
        (Bar(0.8, least=True, of="nginx"), 79.0, 100.0, False),
        (Bar(0.8, least=True, of="nginx"), 79.0, None, None),
    ],
)
def test_bars(bar: Bar, value: float, other: float | None, met: bool | None) -> None:
    assert bar.is_met(value, other) is met


def test_figures_have_three_digits() -> None:
    assert [number(value) for value in (0.123, 1.234, 12.34, 123.4, 12345.0)] == [
        "0.12",
        "1.23",
        "12.3",
        "123",
        "12,300",
    ]
