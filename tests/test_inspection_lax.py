import pytest

from vllmproxy.inspection.lax import MOST, count_of, truth_of


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        *((value, True) for value in (True, 1, 1.0, "true", "TRUE", "True", "yes", "on", "t", "y", "1")),
        *((value, False) for value in (None, False, 0, 0.0, -0.0, "false", "off", "f", "n", "no", "0", "OFF")),
        *((value, None) for value in (2, -1, 0.5, "maybe", " true", "", [], {}, [True], float("nan"))),
    ],
)
def test_truth_is_what_vllm_takes_it_for(value: object, truth: bool | None) -> None:
    """Each was sent to vLLM 0.32 as ``stream``; it answered 400 to those that are ``None`` here."""
    assert truth_of(value) is truth


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (5, 5),
        (0, 0),
        (-1, 0),
        (-1.0, 0),
        (True, 1),
        (False, 0),
        (5.0, 5),
        ("5", 5),
        ("+5", 5),
        (" 5 ", 5),
        ("5.0", 5),
        ("1_0", 10),
        (10**30, MOST),
        (1e30, MOST),
        ("9" * 99, MOST),
        ("9" * 5000, MOST),
        ("0" * 4200 + "128", 128),
        ("5." + "0" * 200, 5),
        ("\u00a05\u2003", 5),
        ("0_0_5", 5),
        ("_", 0),
        (5.5, None),
        (float("inf"), None),
        (float("nan"), None),
        ("5e0", None),
        ("\u0665", None),
        ("", None),
        (None, None),
        ([5], None),
        ({}, None),
    ],
)
def test_count_is_what_vllm_takes_it_for(value: object, count: int | None) -> None:
    """Each was sent to vLLM 0.32 as ``max_tokens``; what it refuses is 0, ``MOST`` or ``None``."""
    assert count_of(value) == count
    assert type(count_of(value)) is type(count)
