"""The whole API over a real socket, with Twisted's own server in front of it."""

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from _api import CUSTOM, MASTER, House
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogEvent, Logger
from twisted.python.failure import Failure

from vllmproxy import __version__
from vllmproxy.api import errors as api_errors
from vllmproxy.errors import Internal
from vllmproxy.keys.key import hash_key

FORWARDED = {"X-Forwarded-For": "192.0.2.1"}


@pytest_twisted.async_yield_fixture
async def open_house() -> AsyncIterator[House]:
    it = House(auth=False)
    await it.open()
    yield it
    await it.close()


@pytest_twisted.ensureDeferred
async def test_generate_answers_litellms_row_and_shows_the_key_once(house: House) -> None:
    answer = await house.ask("POST", "/key/generate", {"key_alias": "a", "duration": "30d", "metadata": {"x": 1}})
    made = answer.json
    assert answer.status == 200
    assert answer.headers.getRawHeaders("content-type") == ["application/json"]
    assert answer.headers.getRawHeaders("cache-control") == ["no-store"]
    assert made["key"].startswith("sk-")
    assert len(made["key"]) >= 35
    assert made["token"] == made["token_id"] == hash_key(made["key"])
    assert made["key_name"] == "sk-..." + made["key"][-4:]
    assert made["expires"] == "2023-12-14T22:13:20.000Z"
    assert made["duration"] == "30d"
    assert (made["key_alias"], made["metadata"], made["created_by"]) == ("a", {"x": 1}, "master")
    assert {
        "user_id",
        "team_id",
        "tags",
        "models",
        "aliases",
        "blocked",
        "allowed_routes",
        "key_type",
    } <= set(made)
    assert {"max_budget", "soft_budget", "budget_duration", "spend", "rpm_limit", "tpm_limit"} <= set(made)
    assert {"max_parallel_requests", "model_rpm_limit", "model_tpm_limit", "permissions"} <= set(made)
    info = await house.ask("GET", f"/key/info?key={made['token']}")
    assert made["key"].encode() not in info.body


@pytest_twisted.ensureDeferred
async def test_generate_takes_an_empty_body_and_makes_different_keys(house: House) -> None:
    first = await house.ask("POST", "/key/generate")
    second = await house.ask("POST", "/key/generate", b"{}")
    assert first.status == second.status == 200
    assert first.json["key"] != second.json["key"]
    assert first.json["expires"] is None


@pytest_twisted.ensureDeferred
async def test_curls_form_content_type_does_not_matter(house: House) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await house.ask("POST", "/key/generate", {"key_alias": "curl"}, headers=headers)
    assert answer.json["key_alias"] == "curl"


@pytest_twisted.ensureDeferred
async def test_custom_key(house: House) -> None:
    # A caller that tried too early is let in as soon as the key exists.
    assert (await house.ask("GET", "/key/info", key=CUSTOM)).status == 401
    assert (await house.make(key=CUSTOM))["key"] == CUSTOM
    assert (await house.ask("GET", "/key/info", key=CUSTOM)).status == 200
    for key in (CUSTOM, MASTER):
        again = await house.ask("POST", "/key/generate", {"key": key})
        assert (again.status, again.error["param"]) == (400, "key")
        assert "exists already" in again.error["message"]
    short = await house.ask("POST", "/key/generate", {"key": "sk-short"})
    assert (short.status, short.error["type"], short.error["param"]) == (400, "bad_request_error", "key")


@pytest_twisted.ensureDeferred
async def test_a_taken_alias(house: House) -> None:
    await house.make(key_alias="team-a")
    answer = await house.ask("POST", "/key/generate", {"key_alias": "team-a"})
    assert answer.status == 400
    assert (answer.error["type"], answer.error["param"]) == ("bad_request_error", "key_alias")
    assert "team-a" in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", "None"),
        (b"[]", "None"),
        (b'{"unheard_of": 1}', "unheard_of"),
        (b'{"max_budget": 10}', "max_budget"),
        (b'{"key_type": "superuser"}', "key_type"),
        (b'{"allowed_routes": ["openai_routes"]}', "allowed_routes"),
        (b'{"allowed_routes": ["/v1/*/x"]}', "allowed_routes"),
        (b'{"metadata": "x"}', "metadata"),
        (b'{"duration": "soon"}', "duration"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_body_that_is_refused(house: House, body: bytes, param: str) -> None:
    answer = await house.ask("POST", "/key/generate", body)
    assert answer.status == 400
    assert (answer.error["type"], answer.error["param"]) == ("bad_request_error", param)


@pytest_twisted.ensureDeferred
async def test_info_for_the_master_key(house: House) -> None:
    made = await house.make(key_alias="a", user_id="u")
    for name in (made["key"], made["token"]):
        answer = await house.ask("GET", f"/key/info?key={name}")
        assert answer.status == 200
        assert answer.json["key"] == name
        assert (answer.json["info"]["key_alias"], answer.json["info"]["user_id"]) == ("a", "u")
        assert "token" not in answer.json["info"]
    for query in ("?key=sk-nobody-has-this-key", ""):
        answer = await house.ask("GET", "/key/info" + query)
        assert (answer.status, answer.error["type"]) == (404, "not_found_error")
        assert answer.error["message"].startswith("Key not found in database")
        assert "nobody" not in answer.error["message"]
    for query in ("?key=a&key=b", "?key=%ff"):
        assert (await house.ask("GET", "/key/info" + query)).status == 400


@pytest_twisted.ensureDeferred
async def test_info_for_a_virtual_key_is_about_itself(house: House) -> None:
    mine, other = await house.make(key_alias="mine"), await house.make(key_alias="other")
    for query in ("", f"?key={mine['key']}", f"?key={mine['token']}"):
        answer = await house.ask("GET", "/key/info" + query, key=mine["key"])
        assert (answer.status, answer.json["info"]["key_alias"]) == (200, "mine")
    assert (await house.ask("GET", "/key/info", key=mine["key"])).json["key"] == mine["token"]
    for name in (other["key"], other["token"], "sk-nobody-has-this-key"):
        answer = await house.ask("GET", f"/key/info?key={name}", key=mine["key"])
        assert (answer.status, answer.error["type"]) == (403, "auth_error")


@pytest_twisted.ensureDeferred
async def test_delete_takes_effect_at_once(house: House) -> None:
    one, two, three = await house.make(), await house.make(key_alias="two"), await house.make()
    for made in (one, two, three):
        assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200
    answer = await house.ask("POST", "/key/delete", {"keys": [one["key"], three["token"]]})
    assert (answer.status, answer.json) == (200, {"deleted_keys": [one["key"], three["token"]]})
    answer = await house.ask("POST", "/key/delete", {"key_aliases": ["two"]})
    assert (answer.status, answer.json) == (200, {"deleted_keys": ["two"]})
    for made in (one, two, three):
        gone = await house.ask("GET", "/key/info", key=made["key"])
        assert (gone.status, gone.error["type"]) == (401, "token_not_found_in_db")
    assert (await house.make(key_alias="two"))["key_alias"] == "two"


@pytest.mark.parametrize("named", ["key", "token"])
@pytest_twisted.ensureDeferred
async def test_delete_tells_a_key_from_an_alias_that_is_spelt_like_it(house: House, named: str) -> None:
    made = await house.make()
    other = await house.make(key_alias=made[named])
    answer = await house.ask("POST", "/key/delete", {"keys": [made[named]], "key_aliases": [made[named]]})
    assert (answer.status, answer.json) == (200, {"deleted_keys": [made[named]] * 2})
    for each in (made, other):
        assert (await house.ask("GET", "/key/info", key=each["key"])).status == 401


@pytest_twisted.ensureDeferred
async def test_delete_says_what_it_did_not_find(house: House) -> None:
    made = await house.make(key_alias="here")
    body = {"keys": [made["key"], "sk-nobody-has-this-key"], "key_aliases": ["nobody", "here"]}
    answer = await house.ask("POST", "/key/delete", body)
    assert answer.status == 200
    assert answer.json == {
        "deleted_keys": [made["key"], "here"],
        "not_found": ["sk-nobody-has-this-key", "nobody"],
    }
    answer = await house.ask("POST", "/key/delete", {"keys": [made["key"]]})
    assert (answer.status, answer.error["type"], answer.error["param"]) == (404, "not_found_error", "keys")
    answer = await house.ask("POST", "/key/delete", {"key_aliases": ["here"]})
    assert (answer.status, answer.error["param"]) == (404, "key_aliases")
    for bad in ({}, {"keys": "x"}, {"tokens": []}):
        assert (await house.ask("POST", "/key/delete", bad)).status == 400


@pytest.mark.parametrize(("method", "path"), [("POST", "/key/generate"), ("GET", "/key/info"), ("POST", "/key/delete")])
@pytest_twisted.ensureDeferred
async def test_the_contracts_401s(house: House, method: str, path: str) -> None:
    expired, blocked = await house.make(duration="30s"), await house.make(blocked=True)
    house.clock.advance(30)
    table = [
        ({}, "auth_error", "None", "Authentication Error, No api key passed in."),
        (
            {"Authorization": MASTER},
            "auth_error",
            "None",
            "Authentication Error, Malformed API Key passed in. Ensure Key has `Bearer ` prefix.",
        ),
        (
            {"x-api-key": "sk-nobody-has-this-key"},
            "token_not_found_in_db",
            "key",
            "Authentication Error, Invalid proxy server token passed.",
        ),
        ({"API-Key": expired["key"]}, "expired_key", "None", "Authentication Error - Expired Key."),
        (
            {"x-litellm-api-key": blocked["key"]},
            "auth_error",
            "None",
            "Authentication Error, Key is blocked.",
        ),
    ]
    for headers, kind, param, message in table:
        answer = await house.ask(method, path, key=None, headers=headers)
        assert answer.status == 401
        assert (answer.error["type"], answer.error["param"]) == (kind, param)
        assert answer.error["message"].startswith(message)
        assert answer.headers.getRawHeaders("www-authenticate") == ["Bearer"]


@pytest_twisted.ensureDeferred
async def test_a_virtual_key_manages_nothing(house: House) -> None:
    made = await house.make()
    for path in ("/key/generate", "/key/delete"):
        answer = await house.ask("POST", path, {"keys": [made["key"]]}, key=made["key"])
        assert (answer.status, answer.error["type"]) == (403, "auth_error")
        assert answer.error["message"].startswith("Virtual key is not allowed to call this route.")
    assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200


@pytest_twisted.ensureDeferred
async def test_auth_off_has_no_keys_to_manage(open_house: House) -> None:
    for method, path in (("POST", "/key/generate"), ("POST", "/key/delete"), ("GET", "/key/info?key=sk-a")):
        answer = await open_house.ask(method, path, key="anything")
        assert answer.status == 403
        assert "--master-key-file" in answer.error["message"]


@pytest_twisted.ensureDeferred
async def test_a_closed_store_is_503_and_not_401(house: House) -> None:
    made = await house.make()
    await house.store.close()
    for method, path, key in (
        ("POST", "/key/generate", MASTER),
        ("GET", "/key/info?key=sk-a", MASTER),
        ("GET", "/key/info", made["key"]),
    ):
        answer = await house.ask(method, path, key=key)
        assert (answer.status, answer.error["type"]) == (503, "no_db_connection")
        assert answer.headers.getRawHeaders("retry-after") == ["1"]


@pytest_twisted.ensureDeferred
async def test_health(house: House) -> None:
    for path in ("/health/liveliness", "/health/liveness"):
        answer = await house.ask("GET", path, key=None)
        assert (answer.status, answer.json) == (200, "I'm alive!")
    ready = await house.ask("GET", "/health/readiness", key=None)
    expected = {"status": "healthy", "db": "connected", "upstream": "reachable", "version": "1.2.3"}
    assert (ready.status, ready.json) == (200, expected)
    house.vllm_is_well = False
    ready = await house.ask("GET", "/health/readiness", key=None)
    expected = {**expected, "status": "unhealthy", "upstream": "unreachable"}
    assert (ready.status, ready.json) == (503, expected)
    house.vllm_is_well = True
    await house.store.close()
    ready = await house.ask("GET", "/health/readiness", key=None)
    assert (ready.status, ready.json["status"], ready.json["db"]) == (503, "unhealthy", "not connected")
    assert (await house.ask("GET", "/health/liveness", key=None)).status == 200


@pytest_twisted.ensureDeferred
async def test_one_of_several_workers_says_how_many_there_are_and_waits_for_their_metrics() -> None:
    metrics: Deferred[tuple[bytes, bytes]] = Deferred()
    crew = House(workers=lambda: (1, 2), metrics_text=lambda: metrics)
    await crew.open()
    try:
        ready = await crew.ask("GET", "/health/readiness", key=None)
        assert (ready.status, ready.json["workers"]) == (200, {"ready": 1, "of": 2})
        asking = Deferred.fromCoroutine(crew.ask("GET", "/metrics", key=None))
        reactor.callLater(0, metrics.callback, (b"text/plain", b"all of them\n"))
        assert (await asking).body == b"all of them\n"
    finally:
        await crew.close()


@pytest_twisted.ensureDeferred
async def test_metrics_are_for_this_machine_and_the_master_key(house: House) -> None:
    answer = await house.ask("GET", "/metrics", key=None)
    assert (answer.status, answer.body) == (200, b"numbers 1\n")
    assert answer.headers.getRawHeaders("content-type") == ["text/plain; version=0.0.4"]
    made = await house.make()
    for headers in (FORWARDED, {"Forwarded": "for=192.0.2.1"}, {"Via": "1.1 x"}, {"X-Real-IP": "127.0.0.1"}):
        assert (await house.ask("GET", "/metrics", key=None, headers=headers)).status == 401
        assert (await house.ask("GET", "/metrics", key=made["key"], headers=headers)).status == 403
        assert (await house.ask("GET", "/metrics", headers=headers)).status == 200


@pytest_twisted.ensureDeferred
async def test_metrics_without_auth_and_opened(open_house: House) -> None:
    assert (await open_house.ask("GET", "/metrics", key=None)).status == 200
    assert (await open_house.ask("GET", "/metrics", key=None, headers=FORWARDED)).status == 403
    opened = House(open_metrics=True)
    await opened.open()
    try:
        assert (await opened.ask("GET", "/metrics", key=None, headers=FORWARDED)).status == 200
    finally:
        await opened.close()


@pytest_twisted.ensureDeferred
async def test_what_is_not_there(house: House) -> None:
    index = await house.ask("GET", "/", key=None)
    assert (index.status, index.json["name"], index.json["vllm"]) == (200, "vllmproxy", "/vllm/")
    for path in (
        "/nothing",
        "/key",
        "/key/",
        "/key/generate/x",
        "/key//generate",
        "/caf%C3%A9",
        "/v1/models",
    ):
        answer = await house.ask("GET", path, key=None)
        assert (answer.status, answer.error["type"]) == (404, "not_found_error"), path
    for method, path, allow in (
        ("GET", "/key/generate", "POST"),
        ("DELETE", "/key/info", "GET, HEAD"),
        ("OPTIONS", "/health/liveness", "GET, HEAD"),
    ):
        answer = await house.ask(method, path)
        assert answer.status == 405
        assert answer.headers.getRawHeaders("allow") == [allow]
        assert allow in answer.error["message"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/chat/completions?x=1", "It is /vllm/v1/chat/completions; an SDK's base_url ends in /vllm/v1."),
        ("/chat/completions", "It is /vllm/v1/chat/completions; an SDK's base_url ends in /vllm/v1."),
        ("/v1/messages", "It is /vllm/v1/messages; an SDK's base_url ends in /vllm."),
        ("/tokenize", "It is /vllm/tokenize."),
        ("/v1/nothing", ""),
        ("/nothing", ""),
    ],
)
@pytest_twisted.ensureDeferred
async def test_who_forgot_vllm_is_told(house: House, path: str, says: str) -> None:
    answer = await house.ask("POST", path, {})
    assert answer.status == 404
    assert answer.error["message"] == f"There is nothing here. vLLM's own API is below /vllm/. {says}".rstrip()


@pytest_twisted.ensureDeferred
async def test_what_klein_cannot_read_is_400_in_the_same_shape(house: House, logged: list[str]) -> None:
    assert (await house.ask("GET", "/%ff", key=None)).error["type"] == "bad_request_error"
    for host in ("a..b", "." * 70, "\u00fc" * 70):
        answer = await house.ask("GET", "/health/liveness", key=None, headers={"Host": host})
        assert answer.status in (200, 400)
        assert answer.headers.getRawHeaders("content-type") == ["application/json"]
    assert "log_failure" not in "".join(logged)


@pytest_twisted.ensureDeferred
async def test_head_answers_the_head_alone(house: House) -> None:
    for path, status in (("/health/liveness", 200), ("/key/info", 404), ("/nothing", 404), ("/metrics", 200)):
        full, head = await house.ask("GET", path), await house.ask("HEAD", path)
        assert full.status == head.status == status
        assert head.body == b""
        assert head.headers.getRawHeaders("content-length") == [str(len(full.body))]
        assert head.headers.getRawHeaders("server") == [f"vllmproxy/{__version__}"]


@pytest_twisted.ensureDeferred
async def test_a_fault_of_ours_is_logged_and_not_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LogEvent] = []
    monkeypatch.setattr(api_errors, "_log", Logger(observer=seen.append))
    house.store.fault = ZeroDivisionError("at 10.0.0.7")
    for path in ("/key/info?key=sk-a", "/health/readiness"):
        answer = await house.ask("GET", path)
        assert (answer.status, answer.error["type"]) == (500, "internal_server_error")
        assert b"10.0.0.7" not in answer.body
        assert b"Traceback" not in answer.body
    assert [event["log_failure"].type for event in seen] == [ZeroDivisionError] * 2


def test_a_cancelled_handler_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LogEvent] = []
    monkeypatch.setattr(api_errors, "_log", Logger(observer=seen.append))
    assert isinstance(api_errors.error_of(Failure(CancelledError())), Internal)
    assert seen == []


@pytest_twisted.ensureDeferred
async def test_a_client_that_hangs_up_cancels_its_handler_in_silence(house: House, logged: list[str]) -> None:
    asked: Deferred[None] = Deferred()
    cancelled: Deferred[None] = Deferred()

    async def never() -> None:
        asked.callback(None)
        await Deferred(lambda _: cancelled.callback(None))

    house.store.ping = never  # type: ignore[method-assign]
    response = Deferred.fromCoroutine(house.ask("GET", "/health/readiness"))
    response.addErrback(lambda failure: failure.check(Exception) and None)
    await asked
    response.cancel()
    await cancelled
    assert "log_failure" not in "".join(logged)


@pytest_twisted.ensureDeferred
async def test_no_key_in_any_log_event_or_error(house: House, logged: list[str]) -> None:
    made = await house.make(key=CUSTOM, key_alias="a")
    bodies = [
        (await house.ask("POST", "/key/generate", {"key": CUSTOM})).body,
        (await house.ask("POST", "/key/generate", {"key": CUSTOM + " "})).body,
        (await house.ask("POST", "/key/generate", {"key_alias": "a"})).body,
        (await house.ask("GET", "/metrics", key="sk-canary-of-nobody", headers=FORWARDED)).body,
        (await house.ask("GET", "/key/info?key=sk-canary-of-nobody")).body,
        (await house.ask("GET", "/key/info?key=sk-canary-of-nobody", key=CUSTOM)).body,
        (await house.ask("GET", "/key/info", headers={"Authorization": MASTER})).body,
        (await house.ask("GET", f"/nothing?key={CUSTOM}")).body,
        (await house.ask("PUT", f"/key/info?key={CUSTOM}")).body,
    ]
    await house.ask("GET", f"/key/info?key={CUSTOM}")
    await house.ask("POST", "/key/delete", {"keys": [CUSTOM]})
    bodies.append((await house.ask("POST", "/key/delete", {"keys": [CUSTOM]})).body)
    assert any(made["token"] in text for text in logged), "the log says which key was made, by its id"
    for text in [*logged, *(body.decode() for body in bodies)]:
        assert "canary" not in text
