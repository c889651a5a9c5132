"""Requests leave nothing to Python's collector, which is therefore told to look seldom."""

import gc
from collections.abc import Iterator

import pytest
from _memory import OK, House
from test_relay_exchange import POST, STREAM

from vllmproxy.errors import AuthError
from vllmproxy.garbage import settle_in

STREAMED = STREAM + b"6\r\ndata: \r\n2\r\n\n\n\r\n0\r\n\r\n"


@pytest.fixture
def collector() -> Iterator[None]:
    """Nothing frozen, and the collector's own settings back, whatever a test makes of them."""
    thresholds = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.parametrize("answer", [OK, STREAMED], ids=["whole", "streamed"])
@pytest.mark.usefixtures("collector")
def test_requests_leave_no_cycles(answer: bytes) -> None:
    house = House()

    def ask() -> None:
        house.client.receive(POST + b"hello")
        house.wires[0].receive(answer)

    ask()
    gc.collect()
    gc.disable()
    for _ in range(10):
        ask()
    house.streams.clear()

    assert gc.collect() == 0
    assert len(house.observer.records) == 11


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.usefixtures("collector")
def test_a_connection_that_ends_in_a_body_leaves_no_cycle(resets: bool) -> None:
    """It would hold what was read last."""
    house = House()

    def leave() -> None:
        house.gate.error = AuthError("No key.")
        client = house.connect()
        client.receive(b"POST /vllm/x HTTP/1.1\r\nHost: h\r\nContent-Length: 10000\r\n\r\n" + b"x" * 5000)
        assert b" 401 " in client.sent
        if resets:
            client.reset_from_peer()
        house.clock.advance(3)
        assert client.lost
        client.protocol = None  # as Twisted's own transports do
        house.gate.error = None  # its traceback has all of it

    leave()
    house.streams.clear()
    gc.collect()
    gc.disable()
    for _ in range(10):
        leave()
    house.streams.clear()

    assert gc.collect() == 0


@pytest.mark.usefixtures("collector")
def test_what_is_there_at_the_start_is_not_looked_at_again() -> None:
    settle_in()
    assert gc.get_freeze_count() > 10_000
    assert gc.get_threshold()[0] > 10_000
