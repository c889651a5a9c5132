"""Keys as their holders know them, through a real proxy process and each of the three stores."""

import hashlib
import signal
import sqlite3
from typing import Any

import pytest
from _asking import CHAT, Reply, ask, bearer, make_key, until
from _redis import RedisServer
from _service import MASTER_KEY, Start, Twistd

MODELS = "/vllm/v1/models"


def opens(service: Twistd, key: str) -> bool:
    """Whether ``key`` opens the door; the only other answer allowed here is the 401 of an unknown key."""
    reply = ask(service, "GET", MODELS, key=key)
    if reply.status == 200:
        return True
    _refused(reply, "token_not_found_in_db", "key", UNKNOWN)
    return False


def _refused(reply: Reply, type: str, param: str | None, beginning: str) -> None:
    assert reply.status == 401
    assert reply.headers["content-type"] == "application/json"
    error = reply.error
    assert error["type"] == type
    assert param is None or error["param"] == param
    assert error["code"] == "401"
    assert error["message"].startswith(beginning)


def _delete(service: Twistd, **names: list[str]) -> Any:
    reply = ask(service, "POST", "/key/delete", names, key=MASTER_KEY)
    assert reply.status == 200, reply.body
    return reply.json()


def test_the_life_of_a_key(stored: Twistd) -> None:
    made = make_key(stored, key_alias="alice", metadata={"team": "blue"}, user_id="u1")
    key = made["key"]
    assert key.startswith("sk-")
    assert made["token"] == made["token_id"] == hashlib.sha256(key.encode()).hexdigest()
    assert made["key_name"] == "sk-..." + key[-4:]
    assert ask(stored, "POST", "/vllm/v1/chat/completions", CHAT, key=key).status == 200

    info = f"/key/info?key={key}"
    until(lambda: ask(stored, "GET", info, key=MASTER_KEY).json()["info"]["spend_tokens"])  # or it might change below
    seen = ask(stored, "GET", info, key=MASTER_KEY).json()
    assert seen["key"] == key
    assert seen["info"]["key_alias"] == "alice"
    assert seen["info"]["metadata"] == {"team": "blue"}
    assert "token" not in seen["info"]
    assert ask(stored, "GET", f"/key/info?key={made['token']}", key=MASTER_KEY).json()["info"] == seen["info"]
    assert ask(stored, "GET", "/key/info", key=key).json()["info"] == seen["info"]

    assert _delete(stored, keys=[key]) == {"deleted_keys": [key]}
    assert not opens(stored, key)  # at once: its place in the cache is gone too
    gone = ask(stored, "GET", f"/key/info?key={key}", key=MASTER_KEY)
    assert gone.status == 404
    assert gone.error["type"] == "not_found_error"
    assert gone.error["message"].startswith("Key not found in database")


def test_aliases(stored: Twistd) -> None:
    key = make_key(stored, key_alias="bob")["key"]
    taken = ask(stored, "POST", "/key/generate", {"key_alias": "bob"}, key=MASTER_KEY)
    assert taken.status == 400
    assert taken.error["type"] == "bad_request_error"
    assert taken.error["param"] == "key_alias"
    assert opens(stored, key)
    assert _delete(stored, key_aliases=["bob"])["deleted_keys"] == ["bob"]
    assert not opens(stored, key)
    assert opens(stored, make_key(stored, key_alias="bob")["key"])


def test_a_key_that_was_refused_before_it_was_made_opens_at_once(stored: Twistd) -> None:
    own = "sk-chosen-by-the-operator-0001"
    assert not opens(stored, own)
    assert make_key(stored, key=own)["key"] == own
    assert opens(stored, own)
    short = ask(stored, "POST", "/key/generate", {"key": "sk-short"}, key=MASTER_KEY)
    assert short.status == 400


def test_a_key_that_expires(stored: Twistd) -> None:
    key = make_key(stored, duration="1s")["key"]
    assert ask(stored, "GET", MODELS, key=key).status == 200
    reply = until(lambda: (found := ask(stored, "GET", MODELS, key=key)).status != 200 and found)
    assert reply
    _refused(reply, "expired_key", None, "Authentication Error - Expired Key.")
    assert opens(stored, make_key(stored, duration="30s")["key"])


def test_a_blocked_key(stored: Twistd) -> None:
    reply = ask(stored, "GET", MODELS, key=make_key(stored, blocked=True)["key"])
    _refused(reply, "auth_error", None, "Authentication Error, Key is blocked.")


MALFORMED = "Authentication Error, Malformed API Key passed in. Ensure Key has `Bearer ` prefix."


UNKNOWN = "Authentication Error, Invalid proxy server token passed."


@pytest.mark.parametrize(
    ("headers", "refusal"),
    [
        ({}, ("auth_error", "None", "Authentication Error, No api key passed in.")),
        ({"Authorization": MASTER_KEY}, ("auth_error", "None", MALFORMED)),
        ({"Authorization": f"Basic {MASTER_KEY}"}, ("auth_error", "None", MALFORMED)),
        (bearer("sk-nobody-has-this-one"), ("token_not_found_in_db", "key", UNKNOWN)),
        ({"x-api-key": "sk-nobody"}, ("token_not_found_in_db", "key", UNKNOWN)),
    ],
)
@pytest.mark.parametrize("path", [MODELS, "/key/info"])
def test_who_is_refused_is_told_so_in_litellm_s_words(
    proxy: Twistd, path: str, headers: dict[str, str], refusal: tuple[str, str, str]
) -> None:
    _refused(ask(proxy, "GET", path, headers=headers), *refusal)


@pytest.mark.parametrize(
    "header", ["Authorization", "authorization", "x-api-key", "X-Api-Key", "x-litellm-api-key", "API-Key"]
)
def test_every_header_a_key_may_come_in(proxy: Twistd, header: str) -> None:
    key = make_key(proxy)["key"]
    value = f"Bearer {key}" if header.lower() == "authorization" else key
    headers = {header: value, "X-Vllmsim": "echo"}
    reply = ask(proxy, "GET", MODELS, headers=headers)
    assert reply.status == 200
    assert key not in reply.body.decode()  # vLLM does not get to see it


def test_of_several_keys_the_first_in_litellm_s_order_counts_and_none_is_passed_on(proxy: Twistd) -> None:
    good, other = make_key(proxy)["key"], "sk-another-key-0123456789"
    reply = ask(
        proxy,
        "GET",
        MODELS,
        headers={**bearer(other), "x-litellm-api-key": good, "x-api-key": other, "X-Vllmsim": "echo"},
    )
    assert reply.status == 200
    assert good not in reply.body.decode()
    assert other not in reply.body.decode()
    assert ask(proxy, "GET", MODELS, headers={**bearer(other), "x-api-key": good}).status == 401


def test_a_virtual_key_manages_nothing(proxy: Twistd) -> None:
    mine, other = make_key(proxy), make_key(proxy)
    assert ask(proxy, "POST", "/key/generate", {}, key=mine["key"]).status == 403
    assert ask(proxy, "POST", "/key/delete", {"keys": [other["key"]]}, key=mine["key"]).status == 403
    assert ask(proxy, "GET", f"/key/info?key={other['key']}", key=mine["key"]).status == 403
    assert opens(proxy, other["key"])


# what a store is for


def test_sqlite_survives_kill_9(start: Start) -> None:
    first = start("--store", "sqlite:keys.sqlite3", directory="same")
    keys = [make_key(first)["key"] for _ in range(20)]
    _delete(first, keys=keys[:1])
    first.stop(signal.SIGKILL)
    second = start("--store", "sqlite:keys.sqlite3", directory="same")
    assert [opens(second, key) for key in keys] == [False] + [True] * 19


def test_with_no_store_named_keys_live_in_the_state_directory(start: Start) -> None:
    first = start(directory="same")
    key = make_key(first)["key"]
    files = list((first.directory / "state" / "vllmproxy").iterdir())
    assert [file.name for file in files if file.suffix == ".sqlite"] == ["vllmproxy.sqlite"]
    assert not [file for file in files if file.stat().st_mode & 0o077]
    first.stop()
    assert opens(start(directory="same"), key)


def test_a_relative_state_directory_has_the_keys_too(start: Start) -> None:
    service = start("--state-directory", "st")
    make_key(service)
    names = {file.name for file in (service.directory / "st").iterdir()}
    assert {"vllmproxy.sqlite", "usage"} <= names
    assert "st" not in names


def test_no_store_holds_a_key_itself(start: Start, server: RedisServer) -> None:
    own = "sk-canary-in-the-store-0001"
    service = start("--store", "sqlite:keys.sqlite3", directory="same")
    token = make_key(service, key=own)["token"]
    opens(service, own)
    service.stop()
    (path,) = service.directory.rglob("keys.sqlite3")
    with sqlite3.connect(path) as database:
        dump = "\n".join(database.iterdump())
    assert token in dump
    assert own not in dump
    assert not [found for found in path.parent.glob("keys.sqlite3*") if own.encode() in found.read_bytes()]

    service = start("--store", server.url)
    make_key(service, key=own)
    opens(service, own)
    assert server.command("SAVE").startswith(b"+OK")
    snapshot = (server.directory / "dump.rdb").read_bytes()
    assert token.encode() in snapshot
    assert own.encode() not in snapshot


def test_two_proxies_share_one_redis(start: Start, server: RedisServer) -> None:
    one, two = start("--store", server.url), start("--store", server.url)
    key = make_key(one)["key"]
    assert opens(two, key)
    assert opens(one, key)
    _delete(two, keys=[key])
    assert not opens(two, key)
    until(lambda: not opens(one, key))  # its cache remembers the key for --key-cache-ttl


def test_a_key_refused_on_one_and_made_on_the_other_opens_within_the_cache_s_time(
    start: Start, server: RedisServer
) -> None:
    one, two = start("--store", server.url), start("--store", server.url)
    own = "sk-chosen-by-the-operator-0002"
    assert not opens(two, own)
    make_key(one, key=own)
    until(lambda: opens(two, own))


@pytest.mark.parametrize("outage", ["stalled", "dead"])
def test_redis_fails_and_comes_back(start: Start, server: RedisServer, outage: str) -> None:
    service = start("--store", server.url, "--key-cache-ttl", "600")
    known, unknown = make_key(service)["key"], make_key(service)["key"]
    assert opens(service, known)
    if outage == "stalled":
        server.stall()
    else:
        server.kill()
    assert ask(service, "GET", MODELS, key=known).status == 200
    for _ in range(3):
        _store_down(ask(service, "GET", MODELS, key=unknown))
        _store_down(ask(service, "GET", MODELS, key="sk-nobody-has-this-one"))
        _store_down(ask(service, "POST", "/key/generate", {}, key=MASTER_KEY))
    assert ask(service, "GET", "/health/readiness").status == 503
    assert ask(service, "GET", "/health/liveliness").json() == "I'm alive!"
    assert ask(service, "GET", MODELS, key=MASTER_KEY).status == 200
    if outage == "stalled":
        server.resume()
        until(lambda: ask(service, "GET", MODELS, key=unknown).status == 200)
    else:
        server.start()  # without its data
    until(lambda: ask(service, "GET", MODELS, key="sk-nobody-has-this-one").status == 401)
    assert opens(service, make_key(service)["key"])
    assert ask(service, "GET", "/health/readiness").status == 200


def test_a_key_that_is_not_believed_any_more_is_not_let_in_blindly(start: Start, server: RedisServer) -> None:
    service = start("--store", server.url, "--key-cache-ttl", "0.2", "--key-max-stale", "0")
    key = make_key(service)["key"]
    assert opens(service, key)
    server.stall()
    reply = until(lambda: (found := ask(service, "GET", MODELS, key=key)).status != 200 and found)
    assert reply
    _store_down(reply)
    server.resume()
    until(lambda: ask(service, "GET", MODELS, key=key).status == 200)


def _store_down(reply: Reply) -> None:
    assert reply.status == 503
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.error["type"] == "no_db_connection"
    assert reply.error["code"] == "503"
