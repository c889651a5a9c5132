"""Proxies are killed under load, again and again: what was used is summed up once, whoever did not see it through."""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import CHAT, Reply, ask, make_key, until
from _load import PRICES, Crowd, Key, check_sums, executed, usage
from _redis import redis_server
from _service import Twistd, start_proxy, start_simulator

BUDGET = 2000


class House:
    """A simulator, and one proxy at a time in front of it, always in the same directory."""

    def __init__(self, directory: Path, store: str) -> None:
        self._directory = directory
        self._store = store
        (directory / "prices.toml").write_text(PRICES)
        self.sim = start_simulator(directory / "sim")

    def start(self) -> Twistd:
        options = ("--store", self._store, "--prices", str(self._directory / "prices.toml"))
        self.proxy = start_proxy(self._directory / "proxy", self.sim.url, *options)
        return self.proxy

    def kill(self) -> None:
        self.proxy.stop(signal.SIGKILL)
        assert "Traceback" not in self.proxy.log

    def settle(self) -> Twistd:
        """Start a proxy, and return when nothing is left of those before it."""
        service = self.start()
        journals = service.directory / "state" / "vllmproxy" / "usage"
        until(lambda: ask(service, "GET", "/health/readiness").status == 200)
        until(lambda: len(list(journals.glob("*.journal"))) == 1)
        return service


@pytest.fixture(params=["sqlite", "redis"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    with redis_server() as redis:
        made = House(tmp_path, redis.url if request.param == "redis" else f"sqlite:{tmp_path / 'keys.sqlite'}")
        yield made
        made.proxy.stop()
        made.sim.stop()
    assert "Traceback" not in made.proxy.log


def make_keys(service: Twistd) -> list[Key]:
    """Keys without a limit, with limits that nobody reaches, and with budgets."""
    limits: list[dict[str, object]] = [{}, {"tpm_limit": 10**9}, {"max_budget_tokens": 10**9}, {"max_budget": 10**6}]
    return [Key(make_key(service, **each)["key"], bool(each)) for each in limits]


def kill_and_start(house: House, rounds: int) -> None:
    crowd = Crowd(make_keys(house.start()))
    stalled = []
    for _ in range(rounds):
        service = house.proxy
        stalled += [crowd.stall(service, key) for key in crowd.keys]
        enough = crowd.whole + random.randint(20, 100)
        with crowd.asking(service):
            until(lambda enough=enough: crowd.whole >= enough, 60)  # type: ignore[misc]
            house.kill()
        house.start()
    house.kill()  # perhaps while it brings to the store what the one before it left
    service = house.settle()
    check_sums(service, house.sim, crowd)
    rows = usage(service, "end_user")
    for asked, wire in stalled:
        row = rows[asked.end_user]
        assert (row["estimated_requests"], row["unknown_requests"]) == ((1, 0) if asked.key.counted else (0, 1))
        wire.close()
    outcomes = {asked.outcome for asked in crowd.asked}
    assert {"whole", "broken"} <= outcomes
    assert len(executed(house.sim)) > rounds * 20


def test_what_was_used_is_counted_once(house: House) -> None:
    kill_and_start(house, 3)


@pytest.mark.slow
def test_what_was_used_is_counted_once_however_often(house: House) -> None:
    kill_and_start(house, 20)


def ask_for(service: Twistd, key: str, tokens: int) -> Reply:
    """Ask for what takes exactly ``tokens`` of a budget."""
    body = {**CHAT, "max_tokens": 1000}
    prompt = -(-len(json.dumps(body)) // 4)
    body["max_tokens"] = tokens - prompt
    assert -(-len(json.dumps(body)) // 4) == prompt
    return ask(service, "POST", "/vllm/v1/chat/completions", body, key=key, headers={"X-Vllmsim": "tpot=0"})


def test_what_a_killed_proxy_held_of_a_budget_is_spent_or_let_go_of(house: House) -> None:
    key = Key(make_key(house.start(), max_budget_tokens=BUDGET)["key"], True)
    crowd = Crowd([key])
    asked, wire = crowd.stall(house.proxy, key)
    assert ask_for(house.proxy, key.secret, BUDGET).status == 422
    house.kill()
    service = house.settle()
    check_sums(service, house.sim, crowd)
    left = BUDGET - usage(service, "end_user")[asked.end_user]["total_tokens"]
    assert 0 < left < BUDGET
    assert ask_for(service, key.secret, left + 1).status == 422
    assert ask_for(service, key.secret, left).status == 200
    wire.close()
