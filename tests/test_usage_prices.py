import contextlib
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.usage.prices import Price, Prices

FILE = """
[models."qwen2.5-7b-instruct"]
input = 0.15
cached_input = 0.05
output = 0.60

[models.whisper]
input = 0
audio_second = 0.0001

[models."*"]
input = 1
"""


@pytest.mark.parametrize(
    ("model", "use", "cost"),
    [
        ("qwen2.5-7b-instruct", (1_000_000, 0, 0, 0), 150_000),
        ("qwen2.5-7b-instruct", (0, 1_000_000, 0, 0), 600_000),
        ("qwen2.5-7b-instruct", (1_000_000, 0, 1_000_000, 0), 50_000),
        ("qwen2.5-7b-instruct", (1_000_000, 0, 400_000, 0), 110_000),
        # 2 * 0.15 + 3 * 0.6 = 2.1
        ("qwen2.5-7b-instruct", (2, 3, 0, 0), 3),
        ("qwen2.5-7b-instruct", (20, 30, 0, 0), 21),
        ("qwen2.5-7b-instruct", (0, 0, 0, 10**9), 0),
        ("qwen2.5-7b-instruct", (10, 0, 99, 0), 1),
        # OpenAI's 0.006 a minute.
        ("whisper", (0, 0, 0, 60_000), 6000),
        ("whisper", (500, 500, 0, 1), 1),
        ("another", (7, 7, 7, 7), 7),
        ("", (1, 0, 0, 0), 1),
        ("another", (0, 0, 0, 0), 0),
    ],
)
def test_cost(model: str, use: tuple[int, int, int, int], cost: int) -> None:
    assert Prices.parse(FILE).cost(model, *use) == cost


def test_a_model_without_a_price_has_no_cost() -> None:
    prices = Prices.parse('[models."a"]\ninput = 0')
    assert prices.cost("b", 1, 1, 0, 0) is None
    assert prices.cost("*", 1, 1, 0, 0) is None
    assert prices.cost("a", 1, 1, 0, 0) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no model"),
        ("models = 1", "no model"),
        ("[models]", "no model"),
        ("models = [", "not TOML"),
        ("\0", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
        ("[prices.a]\ninput = 1", "'prices' at the top"),
        ("[models]\na = 1", "'a' must be a table"),
        ("[models.a]", "'a' has no input"),
        ("[models.a]\noutput = 1", "'a' has no input"),
        ("[models.a]\ninput = 1\ninputs = 1", "'inputs', which is none of input, cached_input, output, audio_second"),
        ("[models.a]\ninput = '1'", "input must be a number"),
        ("[models.a]\ninput = true", "input must be a number"),
        ("[models.a]\ninput = -0.1", "input must be from 0"),
        ("[models.a]\ninput = 1000001", "input must be from 0"),
        ("[models.a]\ninput = inf", "input must be from 0"),
        ("[models.a]\ninput = 1e999999", "input must be from 0"),
        ("[models.a]\ninput = nan", "input must be"),
        ("[models.a]\ninput = 0.0000001", "input may have 6 decimals"),
        ("[models.a]\ninput = 1e-999999", "input may have 6 decimals"),
        ("[models.a]\ninput = 0.1000000000000000000000000000000000001", "input may have 6 decimals"),
        ("[models.a]\ninput = 1\naudio_second = 1e-13", "audio_second may have 12 decimals"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Prices.parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


counts = st.integers(0, 10**12)
prices = st.decimals(0, 10**6, places=6)
audio_prices = st.decimals(0, 10**3, places=12)


@given(input=prices, cached=prices, output=prices, audio=audio_prices, use=st.tuples(counts, counts, counts, counts))
def test_a_cost_is_the_exact_sum_rounded_up_once(
    input: Decimal, cached: Decimal, output: Decimal, audio: Decimal, use: tuple[int, int, int, int]
) -> None:
    written = f"input = {input:f}\ncached_input = {cached:f}\noutput = {output:f}\naudio_second = {audio:f}"
    cost = Prices.parse(f"[models.m]\n{written}").cost("m", *use)
    prompt, completion, hits, milliseconds = use
    hits = min(hits, prompt)
    exact = (Fraction(input) * (prompt - hits) + Fraction(cached) * hits + Fraction(output) * completion) + Fraction(
        audio
    ) * milliseconds * 1000
    assert type(cost) is int
    assert cost == math.ceil(exact)


any_price = st.builds(
    Price,
    input=st.integers(0, 10**12),
    cached_input=st.integers(0, 10**12),
    output=st.integers(0, 10**12),
    audio_second=st.integers(0, 10**12),
)


@given(price=any_price, use=st.tuples(counts, counts, counts, counts), more=st.integers(0, 10**6))
def test_more_never_costs_less(price: Price, use: tuple[int, int, int, int], more: int) -> None:
    cost = price.cost(*use)
    assert cost >= 0
    prompt, completion, cached, audio = use
    assert price.cost(prompt, completion + more, cached, audio) >= cost
    assert price.cost(prompt, completion, cached, audio + more) >= cost
    # A longer prompt whose beginning is in the cache.
    assert price.cost(prompt + more, completion, min(cached, prompt), audio) >= cost


@given(price=any_price, one=st.tuples(counts, counts, counts, counts), two=st.tuples(counts, counts, counts, counts))
def test_two_requests_cost_as_much_as_one_and_at_most_one_micro_unit_more(price: Price, one: Any, two: Any) -> None:
    one, two = ((p, c, min(h, p), a) for p, c, h, a in (one, two))
    both = price.cost(*(a + b for a, b in zip(one, two, strict=True)))
    apart = price.cost(*one) + price.cost(*two)
    assert both <= apart <= both + 1


@given(st.text() | st.text().map(lambda text: f"[models.a]\ninput = {text}"))
def test_any_text_is_prices_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert all(type(price.input) is int for price in Prices.parse(text).models.values())
