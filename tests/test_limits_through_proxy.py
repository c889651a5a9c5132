"""Limits of virtual keys where their holders meet them: at the proxy's door."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from _asking import Reply, ask, make_key, until
from _ports import free_port
from _redis import redis_server
from _service import MASTER_KEY, Twistd, start_proxy

MODELS = "/vllm/v1/models"


@pytest.fixture(scope="module")
def limited(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    service = start_proxy(tmp_path_factory.mktemp("limited"), sim.url, "--store", "memory:")
    yield service
    service.stop()
    assert "Traceback" not in service.log


def test_no_more_than_rpm_limit_pass(limited: Twistd) -> None:
    key = make_key(limited, rpm_limit=3)["key"]
    replies = [ask(limited, "GET", MODELS, key=key) for _ in range(3)]
    assert [reply.status for reply in replies] == [200] * 3
    assert [reply.headers["x-ratelimit-api_key-remaining-requests"] for reply in replies] == ["2", "1", "0"]
    assert {reply.headers["x-ratelimit-api_key-limit-requests"] for reply in replies} == {"3"}
    refused = ask(limited, "GET", MODELS, key=key)
    assert refused.status == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "429")
    assert error["message"].startswith("Rate limit exceeded")
    assert "Limit type: requests" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["rate_limit_type"] == "requests"
    assert refused.headers["reset_at"].endswith(" UTC")


def test_what_is_refused_costs_nothing(limited: Twistd) -> None:
    key = make_key(limited, rpm_limit=2)["key"]
    for _ in range(5):
        assert ask(limited, "POST", "/vllm/sleep", {}, key=key).status == 403
        assert ask(limited, "GET", "/vllm/v1//models", key=key).status == 400
    assert [ask(limited, "GET", MODELS, key=key).status for _ in range(3)] == [200, 200, 429]


def test_what_could_not_be_sent_costs_nothing(tmp_path: Path) -> None:
    proxy = start_proxy(tmp_path, f"http://127.0.0.1:{free_port()}", "--store", "memory:")
    try:
        key = make_key(proxy, rpm_limit=2)["key"]
        assert {ask(proxy, "GET", MODELS, key=key).status for _ in range(5)} == {503}
    finally:
        proxy.stop()


def test_only_so_many_run_at_a_time(limited: Twistd) -> None:
    key = make_key(limited, max_parallel_requests=2)["key"]
    with ThreadPoolExecutor(4) as pool:

        def slow(_: int) -> Reply:
            return ask(limited, "GET", MODELS, key=key, headers={"X-Vllmsim": "bytes; length=10; delay=1.5"})

        statuses = sorted(reply.status for reply in pool.map(slow, range(4)))
    assert statuses == [200, 200, 429, 429]
    until(lambda: ask(limited, "GET", MODELS, key=key).status == 200)


def test_a_stream_that_its_client_leaves_frees_its_place(limited: Twistd) -> None:
    key = make_key(limited, max_parallel_requests=1)["key"]
    with limited.connect() as client:
        head = f"GET {MODELS} HTTP/1.1\r\nHost: a\r\nx-api-key: {key}\r\nX-Vllmsim: stall; after=10\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(100)
        refused = ask(limited, "GET", MODELS, key=key)
        assert (refused.status, refused.headers["rate_limit_type"]) == (429, "max_parallel_requests")
    until(lambda: ask(limited, "GET", MODELS, key=key).status == 200)


def test_the_sdk_raises_its_own_error(limited: Twistd) -> None:
    key = make_key(limited, rpm_limit=1)["key"]
    client = openai.OpenAI(base_url=f"{limited.url}/vllm/v1", api_key=key, max_retries=0)
    client.models.list()
    with pytest.raises(openai.RateLimitError):
        client.models.list()


def test_an_update_takes_effect_at_once(limited: Twistd) -> None:
    key = make_key(limited, rpm_limit=1)["key"]
    assert [ask(limited, "GET", MODELS, key=key).status for _ in range(2)] == [200, 429]
    master = {"key": key, "rpm_limit": 3}
    assert ask(limited, "POST", "/key/update", master, key=MASTER_KEY).status == 200
    assert [ask(limited, "GET", MODELS, key=key).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("value", [-1, 1.5, "many", True, 2**41])
def test_a_limit_is_a_whole_number(limited: Twistd, value: object) -> None:
    reply = ask(limited, "POST", "/key/generate", {"rpm_limit": value}, key=MASTER_KEY)
    assert reply.status == 400
    assert "rpm_limit" in reply.json()["error"]["message"]


def test_two_proxies_on_one_redis_count_together(sim: Twistd, tmp_path: Path) -> None:
    with redis_server() as redis:
        proxies = [start_proxy(tmp_path / name, sim.url, "--store", redis.url) for name in ("one", "two")]
        try:
            key = make_key(proxies[0], rpm_limit=100)["key"]
            with ThreadPoolExecutor(64) as pool:
                statuses = list(pool.map(lambda n: ask(proxies[n % 2], "GET", MODELS, key=key).status, range(300)))
            assert statuses.count(200) == 100
            assert statuses.count(429) == 200
        finally:
            for proxy in proxies:
                proxy.stop()
        assert all("Traceback" not in proxy.log for proxy in proxies)


def test_the_place_is_free_for_the_request_behind(limited: Twistd) -> None:
    """The next one may be waiting on the same connection, or be sent as soon as the answer is read."""
    key = make_key(limited, max_parallel_requests=1)["key"]
    one = f"GET {MODELS} HTTP/1.1\r\nHost: a\r\nx-api-key: {key}\r\n"
    with limited.connect() as client:
        client.sendall((f"{one}\r\n" * 5 + f"{one}Connection: close\r\n\r\n").encode())
        received = b""
        while piece := client.recv(65536):
            received += piece
    assert received.count(b"HTTP/1.1 200 ") == 6


def test_a_settlement_that_redis_did_not_hear_is_told_again(sim: Twistd, tmp_path: Path) -> None:
    with redis_server() as redis:
        proxy = start_proxy(tmp_path, sim.url, "--store", redis.url)
        try:
            key = make_key(proxy, max_parallel_requests=1)["key"]
            with ThreadPoolExecutor(1) as pool:
                slow = {"X-Vllmsim": "bytes; length=10; delay=1.5"}
                running = pool.submit(ask, proxy, "GET", MODELS, key=key, headers=slow)
                time.sleep(0.5)  # it is admitted
                redis.stall()
                assert running.result().status == 200
                time.sleep(0.5)  # its settlement is over time
                redis.resume()
            until(lambda: ask(proxy, "GET", MODELS, key=key).status == 200)
        finally:
            proxy.stop()


def test_a_proxy_that_stops_frees_the_places_of_its_streams(sim: Twistd, tmp_path: Path) -> None:
    with redis_server() as redis:
        options = ("--store", redis.url, "--drain-timeout", "1")
        one, two = (start_proxy(tmp_path / name, sim.url, *options) for name in ("one", "two"))
        try:
            key = make_key(one, max_parallel_requests=1)["key"]
            with one.connect() as client:
                head = f"GET {MODELS} HTTP/1.1\r\nHost: a\r\nx-api-key: {key}\r\nX-Vllmsim: stall; after=10\r\n\r\n"
                client.sendall(head.encode())
                assert client.recv(100)
                assert ask(two, "GET", MODELS, key=key).status == 429
                one.stop()
            until(lambda: ask(two, "GET", MODELS, key=key).status == 200)
        finally:
            one.stop()
            two.stop()
