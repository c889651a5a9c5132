"""Redis is away while keys that are known go on working: what they use meanwhile is in the sums afterwards, once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import ask, make_key, until
from _load import PRICES, Crowd, Key, check_sums, usage
from _redis import RedisServer, held_tokens
from _service import Twistd, start_proxy

from vllmproxy.keys.key import hash_key


@pytest.fixture
def service(sim: Twistd, durable: RedisServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Twistd]:
    assert ask(sim, "POST", "/vllmsim/reset").status == 200
    (tmp_path / "prices.toml").write_text(PRICES)
    options = ("--store", durable.url, "--prices", str(tmp_path / "prices.toml"), *getattr(request, "param", ()))
    proxy = start_proxy(tmp_path / "proxy", sim.url, *options)
    yield proxy
    proxy.stop()
    assert "Traceback" not in proxy.log


def go_through(redis: RedisServer, service: Twistd, crowd: Crowd, outage: str, *, meanwhile: int = 60) -> None:
    """Ask all the time, before, during and after an outage.

    :param meanwhile: how many vLLM is to answer during it.
    """
    with crowd.asking(service, clients=4):
        before = crowd.served
        until(lambda: crowd.served >= before + 20)
        (redis.kill if outage == "killed" else redis.stall)()
        try:
            begun = crowd.served
            until(lambda: ask(service, "GET", "/health/readiness").status == 503)
            until(lambda: crowd.served >= begun + meanwhile)
        finally:
            (redis.start if outage == "killed" else redis.resume)()
        until(lambda: ask(service, "GET", "/health/readiness").status == 200)
        served = crowd.served
        until(lambda: crowd.served >= served + 20)


def settle(service: Twistd, crowd: Crowd) -> None:
    """Return when what was asked last is in the sums, and so all before it: they are added in order."""
    last = crowd.compose()
    last.ask(service)
    assert last.status == 200
    until(lambda: last.end_user in usage(service, "end_user"))


@pytest.mark.parametrize("outage", ["killed", "stopped"])
def test_what_was_used_meanwhile_is_added_once(service: Twistd, sim: Twistd, durable: RedisServer, outage: str) -> None:
    crowd = Crowd([Key(make_key(service)["key"], False) for _ in range(3)])
    go_through(durable, service, crowd, outage)
    settle(service, crowd)
    assert {asked.status for asked in crowd.asked} == {200}
    check_sums(service, sim, crowd)


@pytest.mark.parametrize("service", [("--store-outage", "local")], indirect=True)
def test_what_keys_with_limits_used_of_their_share_is_added_once(
    service: Twistd, sim: Twistd, durable: RedisServer
) -> None:
    limits: list[dict[str, object]] = [{"tpm_limit": 10**9}, {"rpm_limit": 10**6}, {"max_budget_tokens": 10**9}]
    crowd = Crowd([Key(make_key(service, **each)["key"], "rpm_limit" not in each) for each in limits])
    go_through(durable, service, crowd, "stopped")
    settle(service, crowd)
    assert {asked.status for asked in crowd.asked} == {200, 503}  # a budget is kept in Redis and nowhere else
    check_sums(service, sim, crowd)


def test_of_a_budget_nothing_stays_held(service: Twistd, sim: Twistd, durable: RedisServer) -> None:
    crowd = Crowd([Key(make_key(service, max_budget_tokens=10**9)["key"], True) for _ in range(2)])
    for _ in range(2):
        go_through(durable, service, crowd, "stopped", meanwhile=0)
    settle(service, crowd)
    check_sums(service, sim, crowd)
    for key in crowd.keys:
        until(lambda key=key: held_tokens(durable, hash_key(key.secret)) == 0)  # type: ignore[misc]


def test_a_proxy_that_stops_meanwhile_leaves_it_to_the_next(
    service: Twistd, sim: Twistd, durable: RedisServer, tmp_path: Path
) -> None:
    crowd = Crowd([Key(make_key(service)["key"], False)])
    with crowd.asking(service, clients=4):
        until(lambda: crowd.served >= 10)
        durable.stall()
        until(lambda: ask(service, "GET", "/health/readiness").status == 503)
        served = crowd.served
        until(lambda: crowd.served >= served + 20)
    service.stop()
    durable.resume()
    options = ("--store", durable.url, "--prices", str(tmp_path / "prices.toml"))
    heir = start_proxy(tmp_path / "proxy", sim.url, *options)
    try:
        until(lambda: ask(heir, "GET", "/health/readiness").status == 200)
        settle(heir, crowd)
        check_sums(heir, sim, crowd)
    finally:
        heir.stop()
    assert "Traceback" not in heir.log
