"""Limits of tokens, of single models, and budgets: at two proxies that share a Redis, with many clients at once."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from _asking import CHAT, Reply, ask, make_key, until
from _raw import Message, Wire, connect, request
from _redis import redis_server
from _service import MASTER_KEY, Twistd, start_proxy, start_simulator
from attrs import field, frozen

MODEL = str(CHAT["model"])
CHAT_PATH = "/vllm/v1/chat/completions"
#: In micro-units for each token.
INPUT, OUTPUT = 10, 10
PRICES = f'[models."*"]\ninput = {INPUT}.0\noutput = {OUTPUT}.0\n'

#: What every request here asks for, and so what it takes of a limit before it is forwarded.
BODY = {**CHAT, "max_tokens": 70}
PROMPT = -(-len(json.dumps(BODY)) // 4)
TOKENS = PROMPT + 70
MONEY = PROMPT * INPUT + 70 * OUTPUT
#: For how many of them a limit has room; what is left is not enough for another.
ROOM = 7
MOST_TOKENS = ROOM * TOKENS + TOKENS - 1
MOST_MONEY = ROOM * MONEY + MONEY - 1


@frozen
class Limit:
    """A limit with room for :data:`ROOM` requests.

    :ivar fields: of the key.
    :ivar cost: what a request takes of it, and ``kept``: what it keeps of that if vLLM never answers.
    :ivar kind: as a refusal calls it, ``""`` for a budget.
    """

    fields: dict[str, Any]
    most: int
    cost: int
    kept: int
    kind: str = ""

    @property
    def room_again(self) -> int:
        """For how many there is room when :data:`ROOM` have been given up."""
        return (self.most - ROOM * self.kept) // self.cost


TPM = Limit({"tpm_limit": MOST_TOKENS}, MOST_TOKENS, TOKENS, PROMPT, "tokens")
MODEL_TPM = Limit({"model_tpm_limit": {MODEL: MOST_TOKENS}}, MOST_TOKENS, TOKENS, PROMPT, "tokens")
MODEL_RPM = Limit({"model_rpm_limit": {MODEL: ROOM}}, ROOM, 1, 1, "requests")
BUDGET_TOKENS = Limit({"max_budget_tokens": MOST_TOKENS}, MOST_TOKENS, TOKENS, PROMPT)
BUDGET = Limit({"max_budget": MOST_MONEY / 1e6}, MOST_MONEY, MONEY, PROMPT * INPUT)
LIMITS = [TPM, MODEL_TPM, MODEL_RPM, BUDGET_TOKENS, BUDGET]
every_limit = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: next(iter(limit.fields)))


@frozen
class Pair:
    """Two proxies that share a Redis, and a simulator that nobody else asks."""

    sim: Twistd
    proxies: list[Twistd] = field(factory=list)

    def forwarded(self) -> int:
        """How many requests the upstream has seen."""
        count: int = ask(self.sim, "GET", "/vllmsim/stats").json()["requests"].get("/v1/chat/completions", 0)
        return count

    def ask(self, number: int, key: str, tokens: int) -> Reply:
        """Ask one of them, and have vLLM answer with that many tokens."""
        headers = {"X-Vllmsim": f"tokens={tokens}"}
        return ask(self.proxies[number % 2], "POST", CHAT_PATH, BODY, key=key, headers=headers)

    @contextmanager
    def holding(self, key: str) -> Iterator["Held"]:
        """Ask for what vLLM never answers, and give all of it up at the end of the block."""
        held = Held(self, key, self.forwarded())
        try:
            yield held
        finally:
            for wire in held.wires:
                wire.close()


@frozen
class Held:
    """Requests that vLLM never answers: those that are let through wait, those that are refused are told so."""

    pair: Pair
    key: str
    before: int
    wires: list[Wire] = field(factory=list)
    refused: list[Message] = field(factory=list)

    def ask(self, number: int) -> None:
        """Ask that many times at once, in turns, and return when each was let through or refused."""
        body = json.dumps(BODY).encode()
        key = b"x-api-key: " + self.key.encode()
        asking = request(b"POST", CHAT_PATH.encode(), b"X-Vllmsim: stall-head", body=body, key=key)
        wires = [connect(self.pair.proxies[place % 2]) for place in range(number)]
        self.wires.extend(wires)
        for wire in wires:
            wire.send(asking)
        until(self._is_sorted_out)

    def _is_sorted_out(self) -> bool:
        for wire in [wire for wire in self.wires if wire.readable(0)]:
            self.wires.remove(wire)
            self.refused.append(wire.message())
            wire.close()
        return self.pair.forwarded() - self.before == len(self.wires)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("pair")
    (directory / "prices.toml").write_text(PRICES)
    with redis_server() as redis:
        made = Pair(start_simulator(directory / "sim", "--tpot", "0", "--ttft", "0"))
        options = ("--store", redis.url, "--prices", str(directory / "prices.toml"))
        made.proxies.extend(start_proxy(directory / name, made.sim.url, *options) for name in ("one", "two"))
        yield made
        for proxy in made.proxies:
            proxy.stop()
        made.sim.stop()
    assert all("Traceback" not in proxy.log for proxy in made.proxies)


def new_key(pair: Pair, limit: Limit, **fields: object) -> str:
    made: str = make_key(pair.proxies[0], **limit.fields, **fields)["key"]
    return made


def usage(pair: Pair, key: str) -> dict[str, Any]:
    """Return the total of a key's use."""
    total: dict[str, Any] = ask(pair.proxies[0], "GET", f"/usage?key={key}", key=MASTER_KEY).json()["total"]
    return total


def wait_for(pair: Pair, key: str, requests: int) -> None:
    """Return when the sums have that many requests of a key."""
    until(lambda: usage(pair, key)["requests"] == requests)


def used(limit: Limit, total: dict[str, Any]) -> int:
    """Return how much of a limit that is."""
    return round(total["spend"] * 1e6) if "max_budget" in limit.fields else int(total["total_tokens"])


def check_refusal(refused: Message, limit: Limit) -> None:
    error = json.loads(refused.body)["error"]
    assert refused.get(b"content-type") == b"application/json"
    assert isinstance(error["param"], str)
    if not limit.kind:
        assert (refused.status, error["type"], error["code"]) == (422, "budget_exceeded", "422")
        assert error["message"].startswith("Budget has been exceeded!")
        assert not refused.get(b"retry-after")  # it does not begin anew
        return
    assert (refused.status, error["type"], error["code"]) == (429, "rate_limit_error", "429")
    assert error["message"].startswith("Rate limit exceeded")
    assert f"Limit type: {limit.kind}." in error["message"]
    assert 1 <= int(refused.get(b"retry-after")) <= 60
    assert refused.get(b"rate_limit_type") == limit.kind.encode()
    assert re.fullmatch(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", refused.get(b"reset_at"))


@every_limit
def test_no_more_are_let_through_than_there_is_room_for(pair: Pair, limit: Limit) -> None:
    key = new_key(pair, limit)
    with pair.holding(key) as held:
        held.ask(4 * ROOM)
        assert (len(held.wires), len(held.refused)) == (ROOM, 3 * ROOM)
    for refused in held.refused:
        check_refusal(refused, limit)


@pytest.mark.parametrize("limit", [TPM, MODEL_TPM, BUDGET_TOKENS, BUDGET], ids=lambda limit: next(iter(limit.fields)))
def test_what_is_given_up_makes_room_again_and_no_more_than_that(pair: Pair, limit: Limit) -> None:
    key = new_key(pair, limit)
    with pair.holding(key) as held:
        held.ask(ROOM)
        assert not held.refused
    assert 0 < limit.room_again < ROOM
    with pair.holding(key) as held:

        def filled() -> bool:
            held.ask(1)
            return len(held.wires) >= limit.room_again

        until(filled)
        refused = len(held.refused)
        held.ask(8)
        assert (len(held.wires), len(held.refused) - refused) == (limit.room_again, 8)
    wait_for(pair, key, ROOM + limit.room_again)
    assert usage(pair, key)["estimated_requests"] == ROOM + limit.room_again
    assert used(limit, usage(pair, key)) == (ROOM + limit.room_again) * limit.kept


@pytest.mark.parametrize("limit", [TPM, MODEL_TPM], ids=lambda limit: next(iter(limit.fields)))
def test_many_are_served_whose_answers_are_short(pair: Pair, limit: Limit) -> None:
    """What was not used is given back at once: many more than would fit as they were reserved."""
    key = new_key(pair, limit)
    served: list[Reply] = []
    with ThreadPoolExecutor(16) as pool:

        def ask_until_served(number: int) -> None:
            reply = until(lambda: (found := pair.ask(number, key, 5)).status == 200 and found)
            assert reply
            served.append(reply)

        list(pool.map(ask_until_served, range(4 * ROOM)))
    tokens = [reply.json()["usage"]["total_tokens"] for reply in served]
    assert tokens == [1 + 5] * 4 * ROOM
    assert sum(tokens) <= limit.most
    if limit is TPM:
        assert {reply.headers["x-ratelimit-api_key-limit-tokens"] for reply in served} == {str(limit.most)}
        left = [int(reply.headers["x-ratelimit-api_key-remaining-tokens"]) for reply in served]
        assert all(0 <= each <= limit.most - TOKENS for each in left)
        until(lambda: _remaining(pair, key) == limit.most - sum(tokens))


def _remaining(pair: Pair, key: str) -> int:
    """Ask for what takes no tokens, and return how many are left."""
    return int(ask(pair.proxies[1], "GET", "/vllm/v1/models", key=key).headers["x-ratelimit-api_key-remaining-tokens"])


@pytest.mark.parametrize("limit", [BUDGET_TOKENS, BUDGET], ids=lambda limit: next(iter(limit.fields)))
def test_a_budget_is_spent_as_far_as_a_request_fits_in_and_never_beyond(pair: Pair, limit: Limit) -> None:
    key = new_key(pair, limit)
    served = 0
    with ThreadPoolExecutor(8) as pool:
        while True:
            replies = list(pool.map(lambda number: pair.ask(number, key, 40), range(8)))
            assert {reply.status for reply in replies} <= {200, 422}
            admitted = sum(reply.status == 200 for reply in replies)
            served += admitted
            wait_for(pair, key, served)  # and what was held for them is let go of
            assert used(limit, usage(pair, key)) <= limit.most
            if not admitted:
                break
    each = (1 + 40) if limit is BUDGET_TOKENS else INPUT + 40 * OUTPUT
    assert served > ROOM
    assert used(limit, usage(pair, key)) == served * each
    assert limit.most - limit.cost < served * each <= limit.most
    info = ask(pair.proxies[1], "GET", f"/key/info?key={key}", key=MASTER_KEY).json()["info"]
    assert info["spend"] == usage(pair, key)["spend"]


def test_a_budget_that_begins_anew_says_when(pair: Pair) -> None:
    key = new_key(pair, Limit({"max_budget_tokens": TOKENS}, TOKENS, TOKENS, PROMPT), budget_duration="30d")
    assert pair.ask(0, key, 1).status == 200
    reply = pair.ask(0, key, 1)
    assert (reply.status, reply.error["type"]) == (422, "budget_exceeded")
    assert 29 * 86400 < int(reply.headers["retry-after"]) <= 30 * 86400
    assert reply.headers["reset_at"].endswith(" UTC")
    assert reply.headers["reset_at"] in reply.error["message"]


def test_another_model_has_its_own_limit(pair: Pair) -> None:
    key = make_key(pair.proxies[0], model_rpm_limit={MODEL: 1, "other": 2}, model_tpm_limit={MODEL: MOST_TOKENS})["key"]
    assert [pair.ask(number, key, 1).status for number in range(3)] == [200, 429, 429]
    replies = [ask(pair.proxies[n % 2], "POST", CHAT_PATH, {**BODY, "model": "other"}, key=key) for n in range(3)]
    assert [reply.status for reply in replies] == [404, 404, 429]  # vLLM does not have it
    assert "for model other" in replies[2].error["message"]
