"""The server channel against arbitrary bytes, with h11 as the second opinion (``tests/fuzz_wire.py`` runs longer)."""

import random

from _fuzz import REQUEST_TOKENS, REQUESTS, check_request, cuts_in, mutated
from _memory import Wire
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCES = st.randoms(use_true_random=False)


@given(source=SOURCES)
@settings(max_examples=600)
def test_no_request_that_h11_would_not_see(source: random.Random) -> None:
    data = mutated(source, REQUESTS, REQUEST_TOKENS)
    check_request(data, cuts_in(source, data))


@given(source=SOURCES, fin=st.booleans())
@settings(max_examples=300)
def test_nothing_depends_on_how_bytes_are_cut_and_nothing_is_left_behind(source: random.Random, fin: bool) -> None:
    data = mutated(source, REQUESTS, REQUEST_TOKENS)
    whole, cut = Wire(answer=True), Wire(answer=True)
    whole.feed(data)
    cut.feed_split(data, *cuts_in(source, data))
    assert [s for s in cut.seen if s[3]] == [s for s in whole.seen if s[3]]
    assert bool(cut.refused) == bool(whole.refused)
    for wire in (whole, cut):
        (wire.transport.close_from_peer if fin else wire.transport.reset_from_peer)()
        wire.clock.advance(0)
        for _ in range(4):
            wire.clock.advance(100)
        assert wire.transport.lost
        assert not wire.factory.channels
        for index, stream in enumerate(wire.streams):
            assert stream.over
            assert wire.receiver(index).events.count("client_gone") <= 1
        assert not wire.clock.getDelayedCalls()


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    wire = Wire(answer=True)
    wire.feed(data)
    wire.transport.reset_from_peer()
    for _ in range(4):
        wire.clock.advance(100)
    assert not wire.clock.getDelayedCalls()
