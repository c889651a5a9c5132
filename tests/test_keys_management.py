"""Managing keys through a real proxy process and each of the three stores."""

import threading
from typing import Any

from _asking import CHAT, ask, make_key, until
from _redis import RedisServer
from _service import MASTER_KEY, Start, Twistd

MODELS = "/vllm/v1/models"


def manage(service: Twistd, path: str, body: Any, status: int = 200, **headers: str) -> Any:
    reply = ask(
        service, "POST", path, body, key=MASTER_KEY, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert reply.status == status, reply.body
    return reply.json()


def show(service: Twistd, target: str) -> Any:
    reply = ask(service, "GET", target, key=MASTER_KEY)
    assert reply.status == 200, reply.body
    return reply.json()


def test_a_key_is_changed_replaced_listed_and_written_down(stored: Twistd) -> None:
    made = make_key(stored, key_alias="alice", metadata={"team": "blue"})
    key = made["key"]
    assert ask(stored, "GET", MODELS, key=key).status == 200

    manage(stored, "/key/block", {"key": key})
    assert ask(stored, "GET", MODELS, key=key).error["message"].startswith("Authentication Error, Key is blocked.")
    manage(stored, "/key/unblock", {"key": key})
    assert ask(stored, "GET", MODELS, key=key).status == 200

    manage(stored, "/key/update", {"key_alias": "alice", "key_type": "management"})
    refused = ask(stored, "GET", MODELS, key=key)
    assert (refused.status, refused.error["type"]) == (403, "auth_error")
    assert refused.error["message"].startswith("Virtual key is not allowed to call this route.")
    manage(stored, "/key/update", {"key": key, "key_type": None, "duration": "1d"})
    assert ask(stored, "GET", MODELS, key=key).status == 200

    new = manage(stored, "/key/regenerate", {"key": key, "grace_period": "1h"}, X_Request_Id="the-renewal")
    newest = manage(stored, f"/key/{new['token']}/regenerate", {})
    assert ask(stored, "GET", MODELS, key=key).status == 200
    assert ask(stored, "GET", MODELS, key=new["key"]).status == 401
    assert ask(stored, "GET", MODELS, key=newest["key"]).status == 200
    assert (newest["key_alias"], newest["metadata"]) == ("alice", {"team": "blue"})

    listed = show(stored, "/key/list?return_full_object=true&sort_by=updated_at&sort_order=asc")
    assert {each["token"] for each in listed["keys"]} == {made["token"], newest["token"]}
    assert show(stored, "/key/list")["total_count"] == 2
    assert show(stored, "/key/aliases")["aliases"] == ["alice"]

    trail = show(stored, "/audit?limit=100")["entries"]
    actions = ["generate", "block", "unblock", "update", "update", "regenerate", "regenerate"]
    assert [each["action"].removeprefix("/key/") for each in reversed(trail)] == actions
    ids = [each["request_id"] for each in trail]
    assert "the-renewal" in ids
    assert len(set(ids)) == len(ids)
    until(lambda: set(ids) <= {record["request_id"] for record in stored.access_records})
    older = show(stored, f"/audit?limit=3&before={trail[3]['id']}")
    assert [each["id"] for each in older["entries"]] == [each["id"] for each in trail[4:]]


def test_updates_through_two_proxies_at_once_all_survive(start: Start, server: RedisServer) -> None:
    proxies = [start("--store", server.url, "--key-cache-ttl", "0.1") for _ in range(2)]
    made = make_key(proxies[0])
    bodies: list[dict[str, Any]] = [{"user_id": "u"}, {"team_id": "t"}, {"tags": ["t"]}, {"key_alias": "a"}]
    bodies += [{"metadata": {"x": 1}}, {"blocked": True}]
    threads = [
        threading.Thread(target=manage, args=(proxies[number % 2], "/key/update", {"key": made["token"], **body}))
        for number, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    info = show(proxies[0], f"/key/info?key={made['token']}")["info"]
    assert {**info, **{name: value for body in bodies for name, value in body.items()}} == info
    assert len(show(proxies[1], "/audit")["entries"]) == 7
    for proxy in proxies:
        until(lambda proxy=proxy: ask(proxy, "GET", MODELS, key=made["key"]).status == 401)  # type: ignore[misc]


def test_what_was_used_just_now_counts_when_a_key_is_replaced_or_its_spend_is_set(stored: Twistd) -> None:
    def use(key: str) -> int:
        reply = ask(stored, "POST", "/vllm/v1/chat/completions", CHAT, key=key)
        tokens: int = reply.json()["usage"]["total_tokens"]
        return tokens

    key = make_key(stored)["key"]
    used = use(key)
    new = manage(stored, "/key/regenerate", {"key": key})
    assert new["spend_tokens"] == used
    used += use(new["key"])
    reset = manage(stored, f"/key/{new['token']}/reset_spend", {"reset_to": 0})
    assert reset["spend_tokens"] == 0
    used = use(new["key"])
    until(lambda: show(stored, f"/key/info?key={new['token']}")["info"]["spend_tokens"] == used)
