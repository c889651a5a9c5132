"""Is vLLM well? In memory, the test at its end of the connection."""

import pytest
from _memory import House
from twisted.internet.error import ConnectionRefusedError as Refused

from vllmproxy.upstreams.probe import Probe


class Bench:
    def __init__(self, url: str = "http://gpu1:8000") -> None:
        self.house = House(url, authorization=b"authorization: Bearer up\r\n")
        self.probe = Probe(self.house.relay.server, self.house.clock)
        self.told: list[bool] = []

    def ask(self) -> None:
        self.probe.is_well().addCallback(self.told.append)

    def answer(self, status: int, body: bytes = b"") -> None:
        head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        self.house.wires[-1].receive(head + body)


@pytest.mark.parametrize(("status", "well"), [(200, True), (401, True), (404, True), (500, False), (503, False)])
def test_an_answer_tells(status: int, well: bool) -> None:
    bench = Bench()
    bench.ask()
    assert bench.told == []
    assert bench.house.wires[0].sent.startswith(
        b"GET /health HTTP/1.1\r\nhost: gpu1:8000\r\nauthorization: Bearer up\r\n"
    )
    bench.answer(status, b"x" * 10)
    assert bench.told == [well]
    bench.house.turn()
    assert bench.house.wires[0].lost


def test_the_path_of_the_upstream_comes_first() -> None:
    bench = Bench("http://gpu1:8000/base")
    bench.ask()
    assert bench.house.wires[0].sent.startswith(b"GET /base/health HTTP/1.1\r\n")


def test_many_who_ask_at_once_are_one_question_and_its_answer_holds_for_a_second() -> None:
    bench = Bench()
    for _ in range(5):
        bench.ask()
    bench.answer(200)
    bench.ask()
    assert bench.told == [True] * 6
    assert len(bench.house.wires) == 1
    bench.house.clock.advance(1)
    bench.ask()
    bench.answer(503)
    assert bench.told == [True] * 6 + [False]


def test_nobody_there_no_answer_or_no_http() -> None:
    bench = Bench()
    bench.house.endpoint.refuse = Refused()
    bench.ask()
    assert bench.told == [False]
    bench.house.endpoint.refuse = None
    bench.house.clock.advance(1)
    bench.ask()
    bench.house.clock.advance(2)
    assert bench.told == [False, False]
    bench.house.turn()
    assert bench.house.wires[0].lost
    bench.house.clock.advance(1)
    bench.ask()
    bench.house.wires[-1].receive(b"SSH-2.0-x\r\n")
    bench.house.clock.advance(1)
    bench.ask()
    bench.house.wires[-1].close_from_peer()
    bench.house.clock.advance(1)
    assert bench.told == [False] * 4
