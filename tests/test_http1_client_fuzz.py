"""An upstream's arbitrary answers, with h11 as the second opinion (``tests/fuzz_wire.py`` runs longer)."""

import random

from _fuzz import ANSWER_TOKENS, ANSWERS, check_answer, cuts_in, mutated
from hypothesis import given, settings
from hypothesis import strategies as st


@given(
    source=st.randoms(use_true_random=False),
    method=st.sampled_from([b"GET", b"HEAD", b"POST"]),
    end=st.sampled_from(["fin", "reset"]),
)
@settings(max_examples=600)
def test_no_answer_is_whole_that_is_not_for_h11(source: random.Random, method: bytes, end: str) -> None:
    data = mutated(source, ANSWERS, ANSWER_TOKENS)
    check_answer(data, cuts_in(source, data), method, end)


@given(data=st.binary(max_size=200), end=st.sampled_from(["fin", "reset"]))
def test_noise_is_no_answer(data: bytes, end: str) -> None:
    assert not check_answer(data, [], b"GET", end)
