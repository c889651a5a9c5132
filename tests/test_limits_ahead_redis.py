"""Reservations ahead on a real Redis, of several proxies: what counts when all is quiet is what was taken."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _reactor
import pytest
import pytest_twisted
from _asking import CHAT, ask, make_key, until
from _limits import TOKEN, limiter_on, parallel, requests, tokens
from _redis import RedisServer, held_tokens
from _service import Twistd, start_proxy
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.internet.task import deferLater

from vllmproxy.ids import fresh_id
from vllmproxy.keys.key import hash_key
from vllmproxy.limits import behind
from vllmproxy.limits.ahead import Ahead
from vllmproxy.limits.values import Ask, Denied, Rule
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link

#: Seconds after which something has hung, on however busy a machine.
HUNG = 20.0


def counted(server: RedisServer, key: str = TOKEN) -> tuple[int, int, int]:
    """Return how many requests, tokens and places count."""
    fields = ("requests", "total"), ("tokens", "total"), ("places", ":total")
    totals = [server.command("HGET", f"vllmproxy:{{{key}}}:{kind}:", field) for kind, field in fields]
    taken, used, places = (int(total.split(b"\r\n")[1]) if total != b"$-1\r\n" else 0 for total in totals)
    return taken, used, places


async def quiet(server: RedisServer, expected: tuple[int, int, int]) -> None:
    """Return when that counts, and goes on to."""
    await _reactor.until(lambda: counted(server) == expected)
    await deferLater(reactor, 0.1)
    assert counted(server) == expected


class Askers:
    """Requests at several proxies, until the store is away; each runs for a moment, and uses 3 tokens.

    :ivar most: how many ran at a time. :ivar ahead: how many needed not wait.
    """

    def __init__(self, links: list[Link], *rules: Rule, timeout: float = HUNG) -> None:
        self.limiters = [Ahead(limiter_on(link, timeout=timeout), reactor) for link in links]
        self._rules = rules
        self.granted = self.denied = self.unavailable = self.ahead = self.most = self._running = 0
        #: What those that were let in hold of a budget: nobody adds their usage.
        self.held = 0

    async def _ask(self, number: int, times: int) -> None:
        limiter = self.limiters[number % len(self.limiters)]
        for _ in range(times):
            asked = Ask(TOKEN, fresh_id().decode(), self._rules)
            try:
                decision = await maybeDeferred(limiter.reserve, asked)
            except StoreUnavailable:
                self.unavailable += 1
                return
            if isinstance(decision, Denied):
                self.denied += 1
                continue
            self.granted += 1
            self.ahead += bool(decision.request_id)
            pairs = zip(self._rules, decision.taken, strict=True)
            self.held += sum(taken for rule, taken in pairs if rule.kind == "budget_tokens")
            self._running += 1
            self.most = max(self.most, self._running)
            await deferLater(reactor, 0.002)
            self._running -= 1
            costs = tuple(3 if rule.kind == "tokens" else None for rule in self._rules)
            limiter.settle(TOKEN, decision.request_id or asked.request_id, costs)

    async def ask(self, askers: int, times: int) -> None:
        await gatherResults([Deferred.fromCoroutine(self._ask(number, times)) for number in range(askers)])

    async def finish(self) -> None:
        for limiter in self.limiters:
            await limiter.finish()


@pytest_twisted.ensureDeferred
async def test_what_counts_in_the_end_is_what_was_used(server: RedisServer, links: list[Link]) -> None:
    askers = Askers(links, requests(10**6), tokens(10**8, 100), parallel(10**5))
    await askers.ask(12, 60)
    assert (askers.granted, askers.denied) == (12 * 60, 0)
    assert askers.ahead > 100
    await quiet(server, (12 * 60, 3 * 12 * 60, 0))
    await askers.finish()
    assert [limiter._stocks for limiter in askers.limiters] == [{}, {}]


@pytest.mark.parametrize("limit", [10**8, 12 * 60 * 100])
@pytest_twisted.ensureDeferred
async def test_a_budget_holds_what_was_let_in_and_nothing_for_nobody(
    server: RedisServer, links: list[Link], limit: int
) -> None:
    rules = requests(10**6), Rule("budget_tokens", "", limit, 100), parallel(10**5)
    askers = Askers(links, *rules)
    await askers.ask(12, 60)
    assert askers.ahead > 50
    assert bool(askers.denied) is (limit < 10**8)  # some hold 128
    await askers.finish()
    assert held_tokens(server, TOKEN) == askers.held <= limit
    assert counted(server)[2] == 0


@pytest_twisted.ensureDeferred
async def test_what_was_ahead_of_a_budget_is_given_back_after_an_outage_however_long(
    server: RedisServer, links: list[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "MATTERS", 0.5)  # seconds, for all else
    monkeypatch.setattr(behind, "SELDOM", 0.5)
    askers = Askers(links, Rule("budget_tokens", "", 10**8, 100), timeout=0.2)
    await askers.ask(8, 40)
    server.stall()
    try:
        await deferLater(reactor, 3)
    finally:
        server.resume()
    await _reactor.until(lambda: held_tokens(server, TOKEN) == askers.held)
    for limiter in askers.limiters:
        assert limiter._stocks == {}
    await askers.finish()


@pytest_twisted.ensureDeferred
async def test_no_more_are_let_in_than_the_limit_and_no_fewer(server: RedisServer, links: list[Link]) -> None:
    """What is ahead is taken, or given back at the first refusal: who goes on asking gets all of the limit."""
    askers = Askers(links, requests(400), tokens(10**8, 100), parallel(10**5))
    await askers.ask(12, 60)
    assert askers.ahead
    assert askers.denied
    await quiet(server, (askers.granted, 3 * askers.granted, 0))
    await askers.ask(2, 400 - askers.granted + 1)
    assert askers.granted == 400
    await quiet(server, (400, 3 * 400, 0))
    await askers.finish()


@pytest_twisted.ensureDeferred
async def test_no_more_run_at_a_time_than_there_are_places(server: RedisServer, links: list[Link]) -> None:
    askers = Askers(links, requests(10**6), tokens(10**8, 100), parallel(64))
    await askers.ask(8, 40)
    await askers.ask(100, 10)
    assert askers.most <= 64
    assert askers.ahead
    assert askers.denied
    await quiet(server, (askers.granted, 3 * askers.granted, 0))
    await askers.finish()


@pytest_twisted.ensureDeferred
async def test_what_is_ahead_is_given_back_at_the_end(server: RedisServer, links: list[Link]) -> None:
    """At once, and not when half a second has passed: the connection is closed next."""
    askers = Askers(links, requests(10**6), tokens(10**8, 100), parallel(10**5))
    await askers.ask(8, 40)
    await askers.finish()
    assert counted(server) == (8 * 40, 3 * 8 * 40, 0)


@pytest_twisted.ensureDeferred
async def test_nothing_is_lost_in_an_outage(server: RedisServer, links: list[Link]) -> None:
    askers = Askers(links, requests(10**6), tokens(10**8, 100), parallel(10**5), timeout=0.2)
    await askers.ask(8, 40)
    running = Deferred.fromCoroutine(askers.ask(8, 10_000))
    await deferLater(reactor, 0.05)
    server.stall()
    try:
        await running
        assert askers.unavailable == 8
    finally:
        server.resume()
    assert askers.ahead
    await quiet(server, (askers.granted, 3 * askers.granted, 0))
    for limiter in askers.limiters:
        assert (limiter._stocks, limiter._behind._kept) == ({}, [])
    await askers.finish()


@pytest.fixture
def proxies(server: RedisServer, sim: Twistd, tmp_path: Path) -> Iterator[list[Twistd]]:
    made = [start_proxy(tmp_path / name, sim.url, "--store", server.url) for name in ("one", "two")]
    yield made
    for proxy in made:
        proxy.stop()
        assert "Traceback" not in proxy.log


def chat(proxies: list[Twistd], key: str, number: int, tells_left: bool = True) -> list[int]:
    """Have 8 clients ask as much each, on connections of their own, and return what each request used."""

    def ask_some(client: int) -> list[int]:
        replies = [ask(proxies[client % 2], "POST", "/vllm/v1/chat/completions", CHAT, key=key) for _ in range(number)]
        assert {reply.status for reply in replies} == {200}
        left = [int(reply.headers["x-ratelimit-api_key-remaining-requests"]) for reply in replies if tells_left]
        assert all(0 < each < 10**5 for each in left)
        return [reply.json()["usage"]["total_tokens"] for reply in replies]

    with ThreadPoolExecutor(8) as pool:
        return [used for each in pool.map(ask_some, range(8)) for used in each]


def test_what_uses_no_tokens_holds_nothing_of_a_budget(server: RedisServer, proxies: list[Twistd]) -> None:
    """It takes what was reserved for others like it, has no usage event, and gives it back."""
    made = make_key(proxies[0], max_budget_tokens=10**6)
    key, token = made["key"], made["token"]

    def look(number: int) -> int:
        return sum(ask(proxies[0], "GET", "/vllm/v1/models", key=key).status == 200 for _ in range(number))

    with ThreadPoolExecutor(3) as pool:
        looks = [pool.submit(look, 60) for _ in range(2)]
        used = pool.submit(chat, [proxies[0]] * 2, key, 8, False)
        assert [each.result() for each in looks] == [60, 60]
    assert used.result()
    until(lambda: held_tokens(server, token) == 0)
    proxies[0].stop()
    assert held_tokens(server, token) == 0


def test_two_proxies_count_what_their_requests_used(server: RedisServer, proxies: list[Twistd]) -> None:
    limits = {"rpm_limit": 10**5, "tpm_limit": 10**8, "max_parallel_requests": 10**4}
    key = make_key(proxies[0], **limits)["key"]
    used = chat(proxies, key, 25)
    until(lambda: counted(server, hash_key(key)) == (8 * 25, sum(used), 0))
    used += chat(proxies, key, 10)
    for proxy in proxies:
        proxy.stop()
    assert counted(server, hash_key(key)) == (8 * 35, sum(used), 0)  # nothing is left to lapse
