"""What keys promise, asked of requests: models, aliases, tokens, budgets; in memory, the test at both ends."""

import gzip
import json
from types import SimpleNamespace
from typing import Any

import pytest
from _memory import House, caller_of
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError as Refused
from twisted.logger import LogEvent, LogLevel, globalLogPublisher

from vllmproxy.keys.key import VirtualKey
from vllmproxy.relay.demand import Demand, rules_of
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.prices import Price, Prices
from vllmproxy.usage.sums import GROUPS, UsageQuery

CHAT = "/vllm/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def post(
    house: House, body: Any, path: str = CHAT, *lines: str, method: str = "POST", kind: str = "application/json"
) -> bytes:
    """Send a request and return the body that vLLM got, ``b""`` if it got none."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    before = sum(len(wire.sent) for wire in house.wires)
    head = [f"{method} {path} HTTP/1.1", "Host: proxy", f"Content-Length: {len(data)}", *lines]
    if kind:
        head.append(f"Content-Type: {kind}")
    house.client.receive("\r\n".join([*head, "", ""]).encode() + data)
    sent = b"".join(wire.sent for wire in house.wires)[before:]
    head_sent, _, rest = sent.partition(b"\r\n\r\n")
    if sent:
        assert f"content-length: {len(rest)}\r\n".encode() in head_sent + b"\r\n"
    return rest


def answer(house: House, body: Any, status: str = "200 OK", *lines: str, kind: str = "application/json") -> bytes:
    """Answer as vLLM, and return what the client got of it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *lines, "", ""]
    house.wires[-1].receive("\r\n".join(head).encode() + data)
    return house.client.take().partition(b"\r\n\r\n")[2]


def error(house: House) -> tuple[int, dict[str, Any]]:
    """Return the status and the error that the client got."""
    head, _, body = house.client.take().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def house_of(**fields: Any) -> House:
    house = House()
    house.gate.caller = caller_of(**fields)
    return house


def read_sums(house: House) -> Any:
    house.clock.advance(1)
    read = house.store.read_usage(UsageQuery(since="1970-01-01", until="1970-01-02", group_by=GROUPS))
    return Deferred.fromCoroutine(read).result


def sums(house: House) -> dict[str, int]:
    """Return the numbers of the one sum that there is."""
    (found,) = read_sums(house)
    return {
        "model": found.group[2],
        "end_user": found.group[3],
        "requests": found.requests,
        "estimated": found.estimated,
        "unknown": found.unknown,
        "prompt": found.prompt_tokens,
        "completion": found.completion_tokens,
        "spend": found.spend,
    }


# models


@pytest.mark.parametrize("model", ["small", "tiny-7b", "fast", "alias-of-small"])
def test_a_model_that_is_allowed_passes_byte_for_byte(model: str) -> None:
    house = house_of(models=("small", "tiny-*", "fast"), aliases={"fast": "big", "alias-of-small": "small"})
    body = b'{ "model" :"%s", "x": 1e2,"messages":[] }' % model.encode()
    called = {"fast": b"big", "alias-of-small": b"small"}.get(model, model.encode())
    assert post(house, body) == body.replace(model.encode(), called)


@pytest.mark.parametrize("model", ["big", "Small", "small ", "tin", "x-tiny-"])
def test_any_other_model_is_refused(model: str) -> None:
    house = house_of(models=("small", "tiny-*"))
    assert post(house, {"model": model, "messages": []}) == b""
    status, told = error(house)
    assert (status, told["type"], told["param"]) == (403, "key_model_access_denied", "model")
    assert house.wires == []


AMBIGUOUS = {
    "twice": b'{"model":"small","model":"big"}',
    "twice, escaped": b'{"model":"small","mod\\u0065l":"big"}',
    "UTF-16": '{"model":"small"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"model":"small"}'.encode("utf-16-le"),
    "a byte order mark": b'\xef\xbb\xbf{"model":"small"}',
    "not UTF-8": b'{"model":"small","x":"\xff"}',
    "not JSON": b'{"model":"small",}',
    "a list": b'["small"]',
    "no string": b'{"model":["small"]}',
    "nothing": b"",
}


@pytest.mark.parametrize("body", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_be_read_as_another_model_is_refused(body: bytes) -> None:
    house = house_of(models=("small",))
    post(house, body)
    assert error(house)[0] in (400, 403)
    assert house.wires == []


#: What vLLM reads and we do not: what it uses, nobody would know.
UNCOUNTABLE = {"UTF-16", "UTF-16 without a mark", "a byte order mark"}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("fields", [{"tpm_limit": 10**6}, {"aliases": {"fast": "big"}}, {"max_budget_tokens": 10**6}])
def test_what_is_only_counted_is_for_vllm_to_judge(name: str, fields: dict[str, Any]) -> None:
    house = house_of(**fields)
    body = AMBIGUOUS[name]
    sent = post(house, body)
    if name in UNCOUNTABLE and "aliases" not in fields:
        assert sent == b""
        assert error(house)[0] == 400
        assert house.wires == []
    else:
        assert sent == body


@pytest.mark.parametrize("twice", ["stream", "max_tokens", "n", "stream_options"])
def test_what_decides_on_the_use_is_given_once(twice: str) -> None:
    body = b'{"model":"m","messages":[],"%s":null,"%s":null}' % (twice.encode(), twice.encode())
    house = house_of(tpm_limit=10**6)
    post(house, body)
    status, told = error(house)
    assert status == 400
    assert f"{twice} is given twice" in told["message"]
    assert post(house_of(aliases={"a": "b"}), body) == body


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        (CHAT, ["Content-Encoding: gzip"]),
        (CHAT, ["Content-Type: multipart/form-data; boundary=x"]),
        ("/vllm/invocations", ["X-Amzn-SageMaker-Adapter-Identifier: big"]),
    ],
)
def test_headers_that_change_what_a_body_means_are_refused(path: str, lines: list[str]) -> None:
    house = house_of(models=("small",))
    post(house, {"model": "small"}, path, *lines)
    assert error(house)[0] == 400
    assert house.wires == []


@pytest.mark.parametrize("body", [b'{"model":"m"}', gzip.compress(b'{"model":"m"}')], ids=["plain", "compressed"])
def test_a_body_that_is_said_to_be_compressed_passes_where_nothing_is_counted(body: bytes) -> None:
    """vLLM reads what comes, whatever Content-Encoding says of it."""
    coded = "Content-Encoding: gzip"
    assert post(house_of(), body, CHAT, coded) == body
    assert post(house_of(aliases={"fast": "big"}), body, CHAT, coded) == body
    counted: list[dict[str, Any]] = [{"tpm_limit": 10**6}, {"max_budget_tokens": 10**6}]
    for fields in counted:
        house = house_of(**fields)
        post(house, body, CHAT, coded)
        status, told = error(house)
        assert status == 400
        assert "the body is compressed" in told["message"]
        assert house.wires == []


@pytest.mark.parametrize("body", [{"messages": []}, {"model": None}, {"model": ""}], ids=["absent", "null", "empty"])
def test_a_key_for_certain_models_has_to_say_which(body: dict[str, Any]) -> None:
    for fields in ({"models": ("small",)}, {"model_rpm_limit": {"small": 1}}, {"model_tpm_limit": {"small": 1}}):
        house = house_of(**fields)
        post(house, body)
        assert error(house)[0] == 403
        assert house.wires == []


def test_a_request_without_a_body_has_none_to_say_it_in() -> None:
    house = house_of(models=("small",))
    house.client.receive(b"POST %s HTTP/1.1\r\nHost: proxy\r\n\r\n" % CHAT.encode())
    assert error(house)[0] == 400
    for path in (b"/vllm/v1/models", b"/vllm/v1/responses/r1", b"/vllm/metrics"):
        house.client.receive(b"GET %s HTTP/1.1\r\nHost: proxy\r\n\r\n" % path)
        answer(house, {})
    assert len(house.observer.records) == 4


@pytest.mark.parametrize("fields", [{"models": ("small",)}, {"tpm_limit": 5}, {"max_budget_tokens": 5}])
def test_a_websocket_of_such_a_key_is_refused(fields: dict[str, Any]) -> None:
    house = house_of(**fields)
    house.client.receive(
        b"GET /vllm/v1/realtime HTTP/1.1\r\nHost: proxy\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    assert error(house)[0] == 403
    assert house.wires == []


def form(*fields: tuple[str, str]) -> bytes:
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    return "".join([*parts, "--b--\r\n"]).encode()


def test_the_model_of_a_form() -> None:
    path, kind = "/vllm/v1/audio/transcriptions", "multipart/form-data; boundary=b"
    house = house_of(models=("whisper",), aliases={"ears": "whisper"})
    assert post(house, form(("file", "x"), ("model", "ears")), path, kind=kind) == form(
        ("file", "x"), ("model", "whisper")
    )
    answer(house, {"text": "", "usage": {"type": "duration", "seconds": 2}})
    for body in (form(("model", "big")), form(("model", "whisper"), ("model", "big")), form(("file", "x"))):
        post(house, body, path, kind=kind)
        assert error(house)[0] in (400, 403)
        house.client = house.connect()


@pytest.mark.parametrize("url", ["http://gpu1:8000/v1", "http://gpu1:8000/base", "http://gpu1:8000/base/v1"])
def test_the_base_path_of_the_upstream_changes_nothing(url: str) -> None:
    house = House(url)
    house.gate.caller = caller_of(models=("small",), tpm_limit=10**6)
    path = "/vllm/chat/completions" if url.endswith("v1") else CHAT
    post(house, {"model": "big"}, path)
    assert error(house)[0] == 403
    sent = post(house, {"model": "small", "stream": True, "messages": MESSAGES}, path)
    assert json.loads(sent)["stream_options"] == {"include_usage": True}


def test_a_websocket_is_in_the_sums_as_unknown() -> None:
    house = house_of(aliases={"fast": "real"})
    house.client.receive(
        b"GET /vllm/v1/realtime HTTP/1.1\r\nHost: proxy\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    house.wires[0].receive(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    house.client.reset_from_peer()
    house.turn()
    told = sums(house)
    assert (told["requests"], told["unknown"]) == (1, 1)


# the body that is held


def test_only_as_much_is_held_as_may_be() -> None:
    house = house_of(models=("small",))
    house.relay.max_inspected_body = 100
    house.client.receive(b"POST %s HTTP/1.1\r\nHost: p\r\nContent-Length: 101\r\n\r\n" % CHAT.encode())
    assert error(house)[0] == 413
    other = house_of(models=("small",))
    other.relay.max_inspected_body = 100
    other.client.receive(b"POST %s HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
    other.client.receive(b"64\r\n%s\r\n" % (b"x" * 100))
    assert other.client.sent == b""
    other.client.receive(b"1\r\nx\r\n")
    assert error(other)[0] == 413
    assert house.relay.held == other.relay.held == 0


def test_all_that_is_held_is_bounded_too() -> None:
    house = house_of(models=("small",))
    house.relay.max_held = 150
    head = b"POST %s HTTP/1.1\r\nHost: p\r\nContent-Length: 100\r\n\r\n" % CHAT.encode()
    house.client.receive(head + b" " * 99)
    assert house.relay.held == 99
    other = house.connect()
    other.receive(head)
    assert b"503 Service Unavailable" in other.take()
    house.client.close_from_peer()
    house.turn()
    assert house.relay.held == 0
    again = house.connect()
    again.receive(head + b'{"model":"small"}'.ljust(100))
    assert len(house.wires) == 1


def test_no_key_takes_all_that_may_be_held() -> None:
    house = house_of(models=("small",))
    house.relay.max_inspected_body, house.relay.max_held = 100, 400
    head = b"POST %s HTTP/1.1\r\nHost: p\r\nContent-Length: 100\r\n\r\n" % CHAT.encode()
    house.client.receive(head + b" " * 60)
    second = house.connect()
    second.receive(head)
    assert b"503 Service Unavailable" in second.take()
    house.gate.caller = caller_of(models=("small",), key_alias="another", token="cd" * 32)
    other = house.connect()
    other.receive(head + b'{"model":"small"}'.ljust(100))
    assert len(house.wires) == 1


def test_the_client_is_asked_for_its_body_once_its_key_is_good() -> None:
    house = house_of(models=("small",))
    body = b'{"model":"small"}'
    house.client.receive(
        b"POST %s HTTP/1.1\r\nHost: p\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        % (CHAT.encode(), len(body))
    )
    assert house.client.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert house.wires == []
    house.client.receive(body)
    assert house.wires[0].sent.endswith(b"\r\n\r\n" + body)


def test_a_chunked_body_goes_on_chunked() -> None:
    house = house_of(aliases={"fast": "small"})
    head = b"POST %s HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
    house.client.receive(head + b'9\r\n{"model":\r\n7\r\n"fast"}\r\n0\r\n\r\n')
    sent = house.wires[0].sent
    assert b"transfer-encoding: chunked" in sent
    assert sent.endswith(b'\r\n\r\n11\r\n{"model":"small"}\r\n0\r\n\r\n')


def test_a_key_without_such_rules_streams_its_body() -> None:
    house = house_of(rpm_limit=5, max_parallel_requests=5, metadata={"a": 1})
    house.client.receive(b"POST %s HTTP/1.1\r\nHost: p\r\nContent-Length: 9\r\n\r\nhal" % CHAT.encode())
    assert house.wires[0].sent.endswith(b"\r\n\r\nhal")


# tokens


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def test_tokens_are_reserved_as_asked_for_and_settled_as_reported() -> None:
    house = house_of(tpm_limit=1000)
    body = {"model": "m", "max_tokens": 900, "messages": MESSAGES}
    expected = 900 + -(-len(json.dumps(body)) // 4)
    post(house, body)
    house.wires[-1].receive(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n")
    head = house.client.take()
    assert b"x-ratelimit-api_key-limit-tokens: 1000\r\n" in head
    assert b"x-ratelimit-api_key-remaining-tokens: %d\r\n" % (1000 - expected) in head
    other = house_of(tpm_limit=1000)
    post(other, body)
    second = other.connect()
    other.client, first = second, other.client
    post(other, body)
    status, told = error(other)
    assert (status, told["type"]) == (429, "rate_limit_error")
    assert "Limit type: tokens" in told["message"]
    other.client = first
    answer(other, {"model": "m", "usage": USAGE})
    other.client = second
    assert post(other, body) != b""


def test_a_request_that_asks_for_more_than_the_limit_is_told_so() -> None:
    house = house_of(tpm_limit=100)
    post(house, {"model": "m", "max_tokens": 5000, "messages": MESSAGES})
    status, told = error(house)
    assert status == 429
    assert "Current limit: 100, Remaining: 100. This request may use 50" in told["message"]
    assert post(house, {"model": "m", "messages": MESSAGES}) != b""  # without a bound of its own it may


@pytest.mark.parametrize("route", ["v1/embeddings", "v1/score", "generative_scoring"])
def test_a_route_that_makes_no_tokens_needs_no_bound(route: str) -> None:
    house = house_of(tpm_limit=10)
    assert post(house, {"model": "m", "input": "x" * 100}, f"/vllm/{route}") == b""
    assert error(house)[0] == 429


def test_a_request_without_a_bound_takes_what_is_left() -> None:
    """Our guess is no reason to refuse it: as long as anything is left, it may have that."""
    for fields in ({"max_budget_tokens": 500}, {"tpm_limit": 500}):
        house = house_of(**fields)
        for _ in range(11):
            assert post(house, {"model": "m", "messages": MESSAGES}) != b""
            answer(house, {"model": "m", "usage": {"prompt_tokens": 1, "completion_tokens": 40, "total_tokens": 41}})
            house.clock.advance(1)
        post(house, {"model": "m", "messages": MESSAGES, "max_tokens": 60})
        status, told = error(house)
        assert status in (422, 429)
        assert "49" in told["message"]  # 500 - 11 * 41
        assert "may use 81" in told["message"]
        assert post(house, {"model": "m", "messages": MESSAGES}) != b""
        second = house.connect()
        house.client = second
        post(house, {"model": "m", "messages": MESSAGES})  # while the first has all that is left
        assert error(house)[0] == status


@pytest.mark.parametrize("name", ["fast", "real"])
def test_limits_of_one_model_by_either_name(name: str) -> None:
    house = house_of(aliases={"fast": "real"}, model_rpm_limit={name: 1})
    post(house, {"model": "fast"})
    answer(house, {})
    for model in ("other", "other"):
        post(house, {"model": model})
        answer(house, {})
    post(house, {"model": "fast"})
    status, told = error(house)
    assert status == 429
    assert f"for model {name}." in told["message"]


@pytest.mark.parametrize(("asked", "model"), [("a", "a"), ("a", "m"), (None, None)])
def test_no_two_rules_of_a_request_are_for_the_same_limit(asked: str | None, model: str | None) -> None:
    each = {"a": 5, "m": 5}
    key = VirtualKey(
        token="t",
        key_name="sk-...",
        rpm_limit=5,
        tpm_limit=5,
        max_parallel_requests=5,
        model_rpm_limit=each,
        model_tpm_limit=each,
        max_budget=5.0,
        max_budget_tokens=5,
    )
    rules = rules_of(key, Demand(asked=asked, model=model, prompt_tokens=3, output_tokens=4, spend=2), 0.0)
    limits = [(rule.kind, rule.scope) for rule in rules]
    assert len(set(limits)) == len(limits) == 5 + 2 * len({asked, model} - {None})
    assert {rule.cost for rule in rules if rule.kind in ("tokens", "budget_tokens")} == {7}


def test_an_answer_that_failed_costs_no_tokens() -> None:
    house = house_of(tpm_limit=1000)
    for _ in range(3):
        assert post(house, {"model": "m", "max_tokens": 900, "messages": MESSAGES}) != b""
        answer(house, {"error": {"message": "no"}}, "400 Bad Request")
    assert sums(house)["prompt"] == 0


# budgets


def test_a_budget_of_tokens() -> None:
    house = house_of(max_budget_tokens=1000)
    body = {"model": "m", "max_tokens": 500, "messages": MESSAGES}
    for _ in range(2):
        assert post(house, body) != b""
        answer(house, {"model": "m", "usage": {"prompt_tokens": 100, "completion_tokens": 150, "total_tokens": 250}})
        house.clock.advance(1)
    assert Deferred.fromCoroutine(house.store.read_account("ab" * 32)).result.tokens == 500
    post(house, body)
    status, told = error(house)
    assert (status, told["type"]) == (422, "budget_exceeded")
    assert told["message"].startswith("Budget has been exceeded!")


PRICES = Prices.parse('[models.m]\ninput = 1\noutput = 10\n[models."real"]\ninput = 2\n')


def test_a_budget_of_money() -> None:
    house = house_of(max_budget=1000, aliases={"fast": "m"})
    house.relay.prices = PRICES
    body = {"model": "fast", "max_tokens": 40, "messages": MESSAGES}
    assert post(house, body) != b""
    answer(house, {"model": "m", "usage": USAGE})
    assert sums(house)["spend"] == 7 + 5 * 10
    assert Deferred.fromCoroutine(house.store.read_account("ab" * 32)).result.spend == 57
    post(house, {**body, "max_tokens": 95})
    status, told = error(house)
    assert status == 422
    assert "0.000943 of 0.001 are left, and this request may use 0.000" in told["message"]


def test_a_soft_budget_warns_once_and_refuses_nothing() -> None:
    warnings: list[LogEvent] = []

    def observe(event: LogEvent) -> None:
        if event.get("log_level") is LogLevel.warn:
            warnings.append(event)

    house = house_of(soft_budget=1000)
    house.relay.prices = PRICES
    globalLogPublisher.addObserver(observe)
    try:
        for number in range(4):
            assert post(house, {"model": "m", "max_tokens": 40, "messages": MESSAGES}) != b""
            assert len(warnings) == (number > 1)
            answer(house, {"model": "m", "usage": {"prompt_tokens": 0, "completion_tokens": 40, "total_tokens": 40}})
            house.clock.advance(1)
    finally:
        globalLogPublisher.removeObserver(observe)
    assert (warnings[0]["key_id"], warnings[0]["soft"]) == ("ab" * 32, "0.001")


def test_a_spend_beyond_all_reason_can_be_read_again() -> None:
    house = house_of(tpm_limit=10**6)
    house.relay.prices = Prices({"m": Price(input=10**12, cached_input=10**12)})
    events: list[UsageEvent] = []
    begin = house.relay.books.begin

    def remembered(expected: UsageEvent) -> Any:
        entry: Any = begin(expected)
        end = entry.end
        return SimpleNamespace(end=lambda event: (events.append(event), end(event)))

    house.relay.books.begin = remembered  # type: ignore[method-assign]
    post(house, {"model": "m", "max_tokens": 4, "messages": MESSAGES})
    answer(house, {"model": "m", "usage": {"prompt_tokens": 2**50, "completion_tokens": 0, "total_tokens": 2**50}})
    (event,) = events
    assert event.spend > 10**15
    assert UsageEvent.of_json(json.loads(event.as_json())) == event


@pytest.mark.parametrize("prices", [None, PRICES])
def test_a_model_without_a_price_is_refused_where_money_counts(prices: Prices | None) -> None:
    house = house_of(max_budget=1000)
    house.relay.prices = prices
    post(house, {"model": "unheard-of"})
    status, told = error(house)
    assert status == 403
    assert "--prices" in told["message"]


def test_who_asks_for_more_than_the_whole_budget_is_not_told_to_wait() -> None:
    house = house_of(max_budget_tokens=100, budget_duration="1h", budget_start=1000, budget_reset_at=4600)
    post(house, {"model": "m", "max_tokens": 200, "messages": MESSAGES})
    assert b"retry-after" not in house.client.sent
    status, told = error(house)
    assert (status, "begins anew" in told["message"]) == (422, False)
    assert "ask for fewer tokens" in told["message"]


def test_who_asks_for_more_than_a_budget_that_is_used_up_is_told_so() -> None:
    house = house_of(max_budget_tokens=100, budget_duration="1h", budget_start=1000, budget_reset_at=4600)
    post(house, {"model": "m", "max_tokens": 20, "messages": MESSAGES})
    answer(house, {"model": "m", "usage": {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100}})
    house.clock.advance(1)
    post(house, {"model": "m", "max_tokens": 200, "messages": MESSAGES})
    status, told = error(house)
    assert (status, "0 tokens of 100 tokens are left" in told["message"]) == (422, True)
    assert "ask for fewer tokens" in told["message"]


def test_the_period_of_a_budget_ends() -> None:
    house = house_of(max_budget_tokens=100, budget_duration="1h", budget_start=1000, budget_reset_at=4600)
    body = {"model": "m", "max_tokens": 20, "messages": MESSAGES}
    post(house, body)
    answer(house, {"model": "m", "usage": {"prompt_tokens": 50, "completion_tokens": 50, "total_tokens": 100}})
    house.clock.advance(1)
    post(house, body)
    head = house.client.sent
    assert b"retry-after: 3599\r\n" in head
    assert b"reset_at: 1970-01-01 01:16:40 UTC\r\n" in head
    assert error(house)[0] == 422
    house.clock.advance(3599)
    house.client = house.connect()
    assert post(house, body) != b""


def test_a_budget_that_nothing_was_forwarded_for_is_whole() -> None:
    house = house_of(max_budget_tokens=100)
    house.endpoint.refuse = Refused()
    for _ in range(5):
        post(house, {"model": "m", "max_tokens": 60, "messages": MESSAGES})
        assert error(house)[0] == 503
    house.clock.advance(1)
    assert Deferred.fromCoroutine(house.store.read_account("ab" * 32)).result.tokens == 0


# usage


def events(*chunks: Any) -> bytes:
    return b"".join(
        b"data: %s\n\n" % (json.dumps(chunk).encode() if chunk != "[DONE]" else b"[DONE]") for chunk in chunks
    )


def delta(text: str) -> dict[str, Any]:
    return {"model": "m", "choices": [{"delta": {"content": text}, "finish_reason": None}]}


EXTRA = {"model": "m", "choices": [], "usage": USAGE}


def stream(house: House, *chunks: Any, end: bool = True) -> bytes:
    """Answer with a stream, an event a read, and return what the client got."""
    wire = house.wires[-1]
    wire.receive(STREAM)
    for chunk in chunks:
        data = events(chunk)
        wire.receive(b"%x\r\n%s\r\n" % (len(data), data))
    if end:
        wire.receive(b"0\r\n\r\n")
    got, _, body = house.client.take().partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in got
    pieces, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        pieces, rest = pieces + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return pieces


def test_a_stream_is_counted_exactly_and_the_client_sees_nothing_of_it() -> None:
    house = house_of(tpm_limit=10**6)
    body = {"model": "m", "stream": True, "messages": MESSAGES}
    assert json.loads(post(house, body))["stream_options"] == {"include_usage": True}
    assert stream(house, delta("a"), delta("b"), EXTRA, "[DONE]") == events(delta("a"), delta("b"), "[DONE]")
    assert house.record.completion_tokens == 5
    assert sums(house) == {
        "model": "m",
        "end_user": "",
        "requests": 1,
        "estimated": 0,
        "unknown": 0,
        "prompt": 7,
        "completion": 5,
        "spend": 0,
    }


def test_a_client_that_asked_for_usage_gets_it() -> None:
    house = house_of(tpm_limit=10**6)
    body = {"model": "m", "stream": True, "messages": MESSAGES, "stream_options": {"include_usage": True}}
    assert post(house, body) == json.dumps(body).encode()
    chunks = (delta("a"), EXTRA, "[DONE]")
    assert stream(house, *chunks) == events(*chunks)


@pytest.mark.parametrize(("mode", "exact"), [("auto", False), ("exact", True), ("passive", False)])
def test_a_key_that_nothing_depends_on(mode: Any, exact: bool) -> None:
    house = house_of()
    house.relay.usage = mode
    body = {"model": "m", "stream": True, "messages": MESSAGES}
    assert (b"include_usage" in post(house, body)) is exact


@pytest.mark.parametrize("fields", [{"tpm_limit": 10**6}, {}])
def test_passive_touches_nothing_and_estimates(fields: dict[str, Any]) -> None:
    house = house_of(**fields)
    house.relay.usage = "passive"
    body = {"model": "m", "stream": True, "messages": MESSAGES}
    assert post(house, body) == json.dumps(body).encode()
    stream(house, delta("a"), delta("b"), "[DONE]")
    told = sums(house)
    assert (told["estimated"], told["completion"]) == (1, 2)
    assert told["prompt"] == -(-len(json.dumps(body)) // 4)


def test_an_aborted_stream_is_charged_for_what_passed() -> None:
    house = house_of(tpm_limit=10**6)
    post(house, {"model": "m", "stream": True, "max_tokens": 5000, "messages": MESSAGES})
    stream(house, delta("a"), delta("b"), delta("c"), end=False)
    house.client.reset_from_peer()
    house.turn()
    told = sums(house)
    assert (told["requests"], told["estimated"], told["completion"]) == (1, 1, 3)


@pytest.mark.parametrize("why", ["left", "revoked"])
def test_what_was_never_sent_costs_nothing(why: str) -> None:
    house = house_of(tpm_limit=10**6)
    house.endpoint.hold = True
    post(house, {"model": "m", "max_tokens": 5000, "messages": MESSAGES})
    if why == "left":
        house.client.reset_from_peer()
    else:
        house.relay.revoke("ab" * 32, forwarded=True)
    house.turn()
    assert not house.wires
    assert read_sums(house) == []


@pytest.mark.parametrize("fields", [{"tpm_limit": 10**6}, {}])
@pytest.mark.parametrize("how", ["before the head", "after it", "the server failed", "an error", "in chunks"])
def test_what_made_nothing_is_charged_for_the_prompt(fields: dict[str, Any], how: str) -> None:
    """vLLM sends the head of a stream before it begins with the prompt."""
    house = house_of(**fields)
    body = {"model": "m", "stream": True, "max_tokens": 5000, "messages": MESSAGES}
    if how == "in chunks":
        data = json.dumps(body).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        house.client.receive(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
    else:
        post(house, body)
    if how == "the server failed":
        house.wires[0].receive(STREAM)
        house.wires[0].reset_from_peer()
    elif how == "an error":
        stream(house, {"error": {"message": "no", "code": 500}}, "[DONE]")
    else:
        if how == "after it":
            stream(house, end=False)
        house.client.reset_from_peer()
    house.turn()
    told = sums(house)
    assert (told["estimated"], told["unknown"]) == (1, 0)
    assert (told["prompt"], told["completion"]) == (-(-len(json.dumps(body)) // 4), 0)


def test_a_redirection_costs_nothing() -> None:
    house = house_of(max_budget_tokens=10**6)
    post(house, {"model": "m", "max_tokens": 900, "messages": MESSAGES}, CHAT + "/")
    answer(house, "", "307 Temporary Redirect", "Location: http://gpu1:8000/v1/chat/completions")
    told = sums(house)
    assert (told["requests"], told["prompt"], told["completion"]) == (1, 0, 0)


def test_a_stream_that_is_shortened_does_not_say_how_long_it_is() -> None:
    house = house_of(tpm_limit=10**6)
    post(house, {"model": "m", "stream": True, "messages": MESSAGES})
    data = events(delta("a"), EXTRA, "[DONE]")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data)
    house.wires[0].receive(head + data)
    got, _, body = house.client.take().partition(b"\r\n\r\n")
    assert b"content-length" not in got
    sent = events(delta("a"), "[DONE]")
    assert b"transfer-encoding: chunked" in got
    assert body == b"%x\r\n%b\r\n0\r\n\r\n" % (len(sent), sent)


def test_an_event_counts_as_many_tokens_as_it_may_hold() -> None:
    for extra, tokens in (({}, 60), ({"max_tokens": 50}, 50), ({"max_tokens": 1}, 3)):
        house = house_of(max_budget_tokens=10**6)
        post(house, {"model": "m", "stream": True, "stream_interval": 20, "messages": MESSAGES, **extra})
        stream(house, delta("a"), delta("b"), delta("c"), end=False)
        house.client.reset_from_peer()
        house.turn()
        assert sums(house)["completion"] == tokens


def test_what_goes_on_without_its_client_is_charged_whole() -> None:
    house = house_of(max_budget_tokens=10**6)
    body = {"model": "m", "stream": True, "background": True, "input": "x", "max_output_tokens": 700}
    post(house, body, "/vllm/v1/responses")
    house.client.reset_from_peer()
    house.turn()
    assert sums(house)["completion"] == 700


def test_an_answer_of_a_route_that_uses_tokens_and_does_not_say_so_is_unknown() -> None:
    house = house_of()
    post(house, {"file": "x"}, "/vllm/v1/audio/translations")
    answer(house, {"text": "hello"})
    assert sums(house)["unknown"] == 1


def test_a_compressed_answer_is_unknown_and_costs_what_was_expected() -> None:
    for fields, tokens in (({}, 0), ({"tpm_limit": 10**6}, 77)):
        house = house_of(**fields)
        post(house, {"model": "m", "max_tokens": 77, "messages": MESSAGES})
        data = gzip.compress(json.dumps({"usage": USAGE}).encode())
        assert answer(house, data, "200 OK", "Content-Encoding: gzip") == data
        told = sums(house)
        assert (told["unknown"], told["estimated"], told["completion"]) == (not tokens, bool(tokens), tokens)


def test_an_answer_that_is_fetched_later_costs_what_was_expected() -> None:
    house = house_of(max_budget_tokens=10**6)
    post(house, {"model": "m", "input": "x", "background": True, "max_output_tokens": 500}, "/vllm/v1/responses")
    answer(house, {"id": "resp_1", "status": "queued", "usage": None, "model": "m"})
    assert sums(house)["completion"] == 500
    house.client.receive(b"GET /vllm/v1/responses/resp_1 HTTP/1.1\r\nHost: proxy\r\n\r\n")
    answer(house, {"id": "resp_1", "status": "completed", "usage": {"input_tokens": 1, "output_tokens": 7}})
    assert sums(house)["requests"] == 1


def test_a_route_that_is_not_known_is_asked_as_much_as_one_that_is() -> None:
    house = house_of(allowed_routes=("/plugin",), granted_by_master=True, models=("small",), tpm_limit=1000)
    post(house, {"model": "big"}, "/vllm/plugin/generate")
    assert error(house)[0] == 403
    body = {"model": "small", "max_tokens": 50}
    assert post(house, body, "/vllm/plugin/generate") == json.dumps(body).encode()
    answer(house, b"\x00", kind="application/octet-stream")
    assert sums(house)["completion"] == 1024  # what bounds its output is not known either


def test_embeddings_as_bytes_tell_their_usage_in_the_head() -> None:
    house = house_of(tpm_limit=10**6)
    post(house, {"model": "m", "input": "x", "encoding_format": "bytes"}, "/vllm/v1/embeddings")
    metadata = json.dumps(
        {"model": "m", "data": [{"start": 0}] * 3000, "usage": {"prompt_tokens": 9, "total_tokens": 9}}
    )
    kind = "application/octet-stream"
    assert answer(house, b"\x00\xff" * 8, "200 OK", f"metadata: {metadata}", kind=kind) == b"\x00\xff" * 8
    told = sums(house)
    assert (told["model"], told["prompt"], told["unknown"], told["estimated"]) == ("m", 9, 0, 0)


@pytest.mark.parametrize(
    ("path", "usage", "prompt", "completion", "is_estimated"),
    [
        ("/vllm/v1/rerank", {"total_tokens": 50}, 50, 0, False),
        ("/vllm/v1/rerank", {"prompt_tokens": 50}, 50, 0, False),
        (CHAT, {"prompt_tokens": 50, "total_tokens": 59}, 50, 9, False),
        (CHAT, {"completion_tokens": 9, "total_tokens": 59}, 50, 9, False),
        (CHAT, {"prompt_tokens": -50, "completion_tokens": 9, "total_tokens": 59}, 50, 9, False),
        (CHAT, {"prompt_tokens": 60, "total_tokens": 59}, 60, 0, False),
        (CHAT, {"total_tokens": 5000}, 25, 4975, True),
        (CHAT, {"total_tokens": 5}, 5, 0, True),
        (CHAT, {"prompt_tokens": 50}, 50, 77, True),
        (CHAT, {"prompt_tokens": 50, "completion_tokens": 1.5}, 50, 77, True),
        (CHAT, {"prompt_tokens": -50, "completion_tokens": 9}, 25, 9, True),
        ("/vllm/v1/audio/transcriptions", {"type": "duration", "seconds": 6}, 0, 0, False),
    ],
)
def test_a_usage_that_tells_half_is_filled(
    path: str, usage: dict[str, Any], prompt: int, completion: int, is_estimated: bool
) -> None:
    house = house_of(max_budget_tokens=10**6)
    body = json.dumps({"model": "m", "max_tokens": 77, "messages": MESSAGES}).ljust(100)
    post(house, body.encode(), path)
    answer(house, {"model": "m", "usage": usage})
    told = sums(house)
    assert (told["prompt"], told["completion"], told["estimated"]) == (prompt, completion, int(is_estimated))


@pytest.mark.parametrize(("usage", "completion"), [({"completion_tokens": 9}, 9), ({"total_tokens": 30}, 5)])
def test_half_a_usage_is_filled_where_nobody_read_the_body(usage: dict[str, Any], completion: int) -> None:
    house = house_of()
    post(house, json.dumps({"model": "m", "messages": MESSAGES}).ljust(100).encode())
    answer(house, {"model": "m", "usage": usage})
    told = sums(house)
    assert (told["prompt"], told["completion"], told["estimated"]) == (25, completion, 1)


def test_what_uses_no_tokens_says_so() -> None:
    house = house_of(tpm_limit=100)
    for _ in range(3):
        assert post(house, {"model": "m", "prompt": "x" * 4000}, "/vllm/tokenize") != b""
        answer(house, {"count": 1000, "tokens": []})
    told = sums(house)
    assert (told["requests"], told["unknown"], told["estimated"], told["prompt"]) == (3, 0, 0, 0)


@pytest.mark.parametrize(
    ("lines", "body", "expected"),
    [
        (["x-litellm-customer-id: header"], {"user": "body"}, "header"),
        ([], {"user": "u", "metadata": {"user_id": "m"}, "safety_identifier": "s"}, "u"),
        ([], {"metadata": {"user_id": "m"}, "safety_identifier": "s"}, "m"),
        ([], {"safety_identifier": "s"}, "s"),
        ([], {}, ""),
    ],
)
def test_the_end_user(lines: list[str], body: dict[str, Any], expected: str) -> None:
    house = house_of(tpm_limit=10**6)
    post(house, {"model": "m", "messages": MESSAGES, **body}, CHAT, *lines)
    answer(house, {"model": "m", "usage": USAGE})
    assert (house.record.end_user or "") == expected
    assert sums(house)["end_user"] == expected


# revoked


def test_what_runs_is_cut_when_its_key_is_revoked() -> None:
    house = house_of(tpm_limit=10**6)
    post(house, {"model": "m", "stream": True, "messages": MESSAGES})
    stream(house, delta("a"), end=False)
    house.relay.revoke("ab" * 32, forwarded=True)
    house.turn()
    assert house.client.lost
    assert house.wires[0].lost
    assert (house.record.ended, house.record.error) == ("refused", "revoked")
    assert sums(house)["completion"] == 1


def test_what_waits_is_told_that_its_key_is_revoked() -> None:
    house = house_of()
    post(house, {"model": "m"})
    house.relay.revoke("ab" * 32, forwarded=True)
    house.turn()
    assert error(house)[0] == 401
    assert house.wires[0].lost
