"""Proxies are killed under load, again and again: what was used is summed up once, whoever did not see it through."""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import CHAT, Reply, ask, make_key, until
from _load import PRICES, Crowd, Key, check_sums, executed, usage
from _redis import RedisServer, held_tokens, redis_server
from _service import Twistd, start_proxy

BUDGET = 2000


class House:
    """Proxies that share a state directory, and a simulator behind them whose counters begin anew.

    :ivar running: by the name of their own directory.
    """

    def __init__(self, sim: Twistd, directory: Path, redis: RedisServer, store: str) -> None:
        self._directory = directory
        self.redis = redis
        self._store = store
        self.state = directory / "state"
        self.running: dict[str, Twistd] = {}
        (directory / "prices.toml").write_text(PRICES)
        self.sim = sim
        assert ask(sim, "POST", "/vllmsim/reset").status == 200

    def start(self, directory: str = "proxy") -> Twistd:
        state = ("--state-directory", str(self.state))
        prices = ("--prices", str(self._directory / "prices.toml"))
        options = ("--store", self._store, *prices, *state, "--drain-timeout", "1")
        self.running[directory] = start_proxy(self._directory / directory, self.sim.url, *options)
        return self.running[directory]

    def kill(self, directory: str = "proxy") -> None:
        self.end(directory, signal.SIGKILL)

    def end(self, directory: str, how: signal.Signals) -> None:
        service = self.running.pop(directory)
        service.stop(how)
        assert "Traceback" not in service.log

    def settle(self) -> Twistd:
        """Start a proxy, and return when nothing is left of those before it."""
        service = self.start()
        until(lambda: ask(service, "GET", "/health/readiness").status == 200)
        until(lambda: len(list((self.state / "usage").glob("*.journal"))) == 1)
        return service

    def stop(self) -> None:
        for service in self.running.values():
            service.stop()
            assert "Traceback" not in service.log


@pytest.fixture(params=["sqlite", "redis"])
def house(request: pytest.FixtureRequest, sim: Twistd, tmp_path: Path) -> Iterator[House]:
    with redis_server() as redis:
        store = redis.url if request.param == "redis" else f"sqlite:{tmp_path / 'keys.sqlite'}"
        made = House(sim, tmp_path, redis, store)
        yield made
        made.stop()


def make_keys(service: Twistd) -> list[Key]:
    """Keys without a limit, with limits that nobody reaches, and with budgets."""
    limits: list[dict[str, object]] = [{}, {"tpm_limit": 10**9}, {"max_budget_tokens": 10**9}, {"max_budget": 10**6}]
    return [Key(make_key(service, **each)["key"], bool(each)) for each in limits]


def kill_and_start(house: House, rounds: int) -> None:
    service = house.start()
    crowd = Crowd(make_keys(service))
    stalled = []
    for _ in range(rounds):
        stalled += [crowd.stall(service, key) for key in crowd.keys]
        enough = crowd.whole + random.randint(20, 100)
        with crowd.asking(service):
            until(lambda enough=enough: crowd.whole >= enough, 60)  # type: ignore[misc]
            house.kill()
        service = house.start()
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


@pytest.mark.long
def test_what_was_used_is_counted_once_however_often(house: House) -> None:
    kill_and_start(house, 20)


@pytest.mark.parametrize("house", ["redis"], indirect=True)
def test_what_was_used_before_a_stop_is_counted_once(house: House) -> None:
    service = house.start()
    crowd = Crowd(make_keys(service))
    for _ in range(2):
        stalled = [crowd.stall(service, key) for key in crowd.keys]
        enough = crowd.whole + 30
        with crowd.asking(service):
            until(lambda enough=enough: crowd.whole >= enough, 60)  # type: ignore[misc]
            house.end("proxy", signal.SIGTERM)
        assert len(list((house.state / "usage").iterdir())) == 0  # the store has all of it
        service = house.start()
        for asked, wire in stalled:
            wire.close()
            assert usage(service, "end_user")[asked.end_user]["estimated_requests"] == 1
    check_sums(service, house.sim, crowd, killed=False)


def ask_for(service: Twistd, key: str, tokens: int) -> Reply:
    """Ask for what takes exactly ``tokens`` of a budget."""
    body = {**CHAT, "max_tokens": 1000}
    prompt = -(-len(json.dumps(body)) // 4)
    body["max_tokens"] = tokens - prompt
    assert -(-len(json.dumps(body)) // 4) == prompt
    return ask(service, "POST", "/vllm/v1/chat/completions", body, key=key, headers={"X-Vllmsim": "tpot=0"})


def test_what_a_killed_proxy_held_of_a_budget_is_spent_or_let_go_of(house: House) -> None:
    service = house.start()
    key = Key(make_key(service, max_budget_tokens=BUDGET)["key"], True)
    crowd = Crowd([key])
    asked, wire = crowd.stall(service, key)
    assert ask_for(service, key.secret, BUDGET).status == 422
    house.kill()
    service = house.settle()
    check_sums(service, house.sim, crowd)
    left = BUDGET - usage(service, "end_user")[asked.end_user]["total_tokens"]
    assert 0 < left < BUDGET
    assert ask_for(service, key.secret, left + 1).status == 422
    assert ask_for(service, key.secret, left).status == 200
    wire.close()


@pytest.mark.parametrize("house", ["redis"], indirect=True)
def test_what_a_killed_proxy_had_ahead_of_a_budget_is_little_and_comes_back(house: House) -> None:
    """Nobody lets go of it, and it is held no more when the next day is over."""
    service, limit, lost = house.start(), 10**7, 0
    made = make_key(service, max_budget_tokens=limit)
    key = Key(made["key"], True)
    crowd = Crowd([key])
    for _ in range(20):
        enough = crowd.whole + 100
        with crowd.asking(service, clients=8):
            until(lambda enough=enough: crowd.whole >= enough, 60)  # type: ignore[misc]
            house.kill()
        service = house.settle()
        lost = held_tokens(house.redis, made["token"])
        if lost:
            break
    assert 0 < lost <= limit // 32
    check_sums(service, house.sim, crowd)
    house.redis.command("HINCRBY", f"vllmproxy:{{{made['token']}}}:budget", "day", "-2")
    assert ask_for(service, key.secret, 100).status == 200
    until(lambda: held_tokens(house.redis, made["token"]) == 0)


@pytest.mark.parametrize("house", ["sqlite"], indirect=True)
def test_proxies_that_share_a_directory_leave_each_other_s_requests_alone(house: House) -> None:
    one, other = house.start("one"), house.start("other")
    crowd = Crowd(make_keys(one))
    with crowd.asking(other, clients=3):
        for _ in range(2):
            enough = crowd.whole + 30
            with crowd.asking(one, clients=3):
                until(lambda enough=enough: crowd.whole >= enough, 60)  # type: ignore[misc]
                house.kill("one")
            one = house.start("one")
            until(lambda one=one: ask(one, "GET", "/health/readiness").status == 200)  # type: ignore[misc]
        house.kill("one")
        house.kill("other")
    check_sums(house.settle(), house.sim, crowd)
