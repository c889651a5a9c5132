"""What changes and shows keys, over a real socket: updates, regeneration, listings, who may do it, and the trail."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from _api import CUSTOM, MASTER, NOW, Answer, House
from _reactor import until
from _stores import hold_commits
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.internet.task import deferLater
from twisted.web.client import ResponseNeverReceived

from vllmproxy.errors import AuthError, Forbidden
from vllmproxy.keys.gate import Caller
from vllmproxy.keys.key import hash_key
from vllmproxy.keys.routes import group_for
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.sqlite import SqliteStore
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account

CHAT = b"/v1/chat/completions"
OTHER = "sk-another-custom-key-0001"


async def post(house: House, path: str, body: Any, key: str = MASTER, **headers: str) -> Answer:
    return await house.ask("POST", path, body, key=key, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def row(house: House, name: str) -> dict[str, Any]:
    answer = await house.ask("GET", f"/key/info?key={name}")
    assert answer.status == 200, answer.body
    info: dict[str, Any] = answer.json["info"]
    return info


def refused(answer: Answer, status: int, param: str | None = None) -> str:
    assert answer.status == status, answer.body
    assert param is None or answer.error["param"] == param
    return answer.error["message"]


async def opens(house: House, key: str, path: bytes = CHAT, base: bytes = b"") -> bool:
    """Whether the relay would let ``key`` call ``path``; it must be one that exists."""
    stored = await house.store.get_key(hash_key(key))
    assert stored is not None
    caller = Caller(stored.token, key=stored)
    refusals = []
    try:
        house.gate.check_route(caller, group_for(base + path, base), base + path, base)
    except Forbidden as error:
        refusals.append(error.message)
    return not [text for text in refusals if text.startswith("Virtual key is not allowed to call this route.")]


@pytest_twisted.ensureDeferred
async def test_update_is_a_merge_patch(house: House) -> None:
    made = await house.make(
        key_alias="a", user_id="u", metadata={"x": 1, "y": 2}, tags=["t"], duration="30d", allowed_routes=["/v1/chat"]
    )
    house.clock.advance(60)
    answer = await post(
        house, "/key/update", {"key": made["key"], "team_id": "t", "metadata": {"z": 3}, "user_id": None}
    )
    assert answer.status == 200
    assert (answer.json["key"], answer.json["token"]) == (made["key"], made["token"])
    info = await row(house, made["token"])
    unchanged = ("key_alias", "tags", "expires", "created_at", "created_by", "key_name", "allowed_routes", "key_type")
    assert {name: info[name] for name in unchanged} == {name: made[name] for name in unchanged}
    assert (info["team_id"], info["user_id"], info["metadata"]) == ("t", None, {"z": 3})
    assert (info["updated_at"], info["updated_by"]) == ("2023-11-14T22:14:20.000Z", "master")
    cleared = {"key_alias": None, "metadata": None, "tags": None, "allowed_routes": None, "blocked": None}
    answer = await post(house, "/key/update", {"key": made["token"], **cleared})
    info = await row(house, made["token"])
    assert [info[name] for name in cleared] == [None, {}, [], [], False]
    assert (await house.make(key_alias="a"))["key_alias"] == "a"


@pytest_twisted.ensureDeferred
async def test_update_by_alias_and_of_the_alias(house: House) -> None:
    made = await house.make(key_alias="a")
    await house.make(key_alias="b")
    answer = await post(house, "/key/update", {"key_alias": "a", "user_id": "u"})
    assert (answer.json["key"], answer.json["user_id"], answer.json["key_alias"]) == (made["token"], "u", "a")
    answer = await post(house, "/key/update", {"key": made["key"], "key_alias": "c"})
    assert answer.json["key_alias"] == "c"
    assert "'b'" in refused(await post(house, "/key/update", {"key": made["key"], "key_alias": "b"}), 400, "key_alias")
    assert (await row(house, made["key"]))["key_alias"] == "c"
    refused(await post(house, "/key/update", {"key_alias": "a", "user_id": "u"}), 404, "key_alias")
    refused(await post(house, "/key/update", {"key": CUSTOM}), 404, "key")
    refused(await post(house, "/key/update", {"user_id": "u"}), 400, "key")


@pytest.mark.parametrize(
    ("duration", "expires"),
    [("-1", None), (None, None), ("30s", "2023-11-14T22:14:20.000Z"), ("1d", "2023-11-15T22:13:50.000Z")],
)
@pytest_twisted.ensureDeferred
async def test_update_of_the_duration_counts_from_now(house: House, duration: str | None, expires: str | None) -> None:
    made = await house.make(duration="1m")
    house.clock.advance(30)
    answer = await post(house, "/key/update", {"key": made["key"], "duration": duration})
    assert answer.json["expires"] == expires
    assert (await house.ask("GET", "/key/info", key=made["key"])).json["info"]["expires"] == expires
    house.clock.advance(30)
    assert (await house.ask("GET", "/key/info", key=made["key"])).status == (401 if duration == "30s" else 200)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tpm_limit", -5),
        ("models", "m"),
        ("max_budget", 1),
        ("unheard_of", 1),
        ("blocked", "yes"),
        ("duration", ""),
        ("duration", "soon"),
        ("key_type", "x"),
        ("allowed_routes", ["x"]),
        ("new_key", OTHER),
    ],
)
@pytest_twisted.ensureDeferred
async def test_update_refuses_what_generate_refuses(house: House, field: str, value: Any) -> None:
    made = await house.make(user_id="u")
    refused(await post(house, "/key/update", {"key": made["key"], "user_id": "v", field: value}), 400, field)
    assert (await row(house, made["key"]))["user_id"] == "u"


@pytest_twisted.ensureDeferred
async def test_concurrent_updates_all_survive(house: House) -> None:
    made = await house.make()
    bodies: list[dict[str, Any]] = [
        {"user_id": "u"},
        {"team_id": "t"},
        {"tags": ["t"]},
        {"key_alias": "a"},
        {"blocked": True},
    ]
    calls = [post(house, "/key/update", {"key": made["key"], **body}) for body in bodies]
    answers = await DeferredList([Deferred.fromCoroutine(call) for call in calls], fireOnOneErrback=True)
    assert [answer.status for _, answer in answers] == [200] * 5
    info = await row(house, made["key"])
    assert {**info, **{k: v for body in bodies for k, v in body.items()}} == info


@pytest_twisted.ensureDeferred
async def test_block_and_unblock_take_effect_at_once(house: House) -> None:
    made = await house.make(key_alias="a")
    assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200
    answer = await post(house, "/key/block", {"key": made["key"]})
    assert (answer.status, answer.json["token"], answer.json["blocked"]) == (200, made["token"], True)
    gone = await house.ask("GET", "/key/info", key=made["key"])
    assert refused(gone, 401).startswith("Authentication Error, Key is blocked.")
    answer = await post(house, "/key/unblock", {"key": made["token"]})
    assert (answer.status, answer.json["blocked"], answer.json["key_alias"]) == (200, False, "a")
    assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200
    for path in ("/key/block", "/key/unblock"):
        assert refused(await post(house, path, {"key": CUSTOM}), 404, "key").startswith("Key not found in database")
        refused(await post(house, path, {}), 400, "key")
        refused(await post(house, path, {"key": made["key"], "user_id": "u"}), 400, "user_id")


@pytest_twisted.ensureDeferred
async def test_regenerate_replaces_the_key(house: House) -> None:
    made = await house.make(key_alias="a", metadata={"x": 1}, allowed_routes=["/v1/chat"], duration="1d")
    assert (await house.ask("GET", "/key/info?key=" + made["key"])).status == 200
    answer = await post(house, "/key/regenerate", {"key": made["key"]})
    new = answer.json
    assert answer.status == 200
    assert new["key"].startswith("sk-")
    assert new["token"] == new["token_id"] == hash_key(new["key"]) != made["token"]
    assert new["key_name"] == "sk-..." + new["key"][-4:]
    kept = ("key_alias", "metadata", "allowed_routes", "expires", "created_at", "created_by", "key_type")
    assert {name: new[name] for name in kept} == {name: made[name] for name in kept}
    assert refused(await post(house, "/key/block", {"key": made["key"]}), 404)
    assert (await house.ask("POST", "/key/health", key=new["key"])).status == 403  # its routes leave that out
    assert (await house.ask("POST", "/key/health", key=made["key"])).error["type"] == "token_not_found_in_db"
    assert (await row(house, new["token"]))["key_alias"] == "a"


@pytest_twisted.ensureDeferred
async def test_regenerate_by_its_path_with_a_key_of_ones_own(house: House) -> None:
    made = await house.make()
    assert (await house.ask("GET", "/key/info", key=OTHER)).status == 401
    answer = await post(house, f"/key/{made['token']}/regenerate", {"new_key": OTHER, "user_id": "u", "duration": "1h"})
    assert (answer.json["key"], answer.json["user_id"], answer.json["duration"]) == (OTHER, "u", "1h")
    assert answer.json["expires"] == "2023-11-14T23:13:20.000Z"
    assert (await house.ask("GET", "/key/info", key=OTHER)).status == 200
    answer = await post(house, f"/key/{OTHER}/regenerate", None)
    assert answer.status == 200
    assert (await house.ask("GET", "/key/info", key=OTHER)).status == 401


@pytest_twisted.ensureDeferred
async def test_regenerate_with_a_grace_period(house: House) -> None:
    made = await house.make(key_alias="a")
    assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200
    new = (await post(house, "/key/regenerate", {"key": made["key"], "grace_period": "30s"})).json
    assert new["expires"] is None
    for key, alias in ((made["key"], None), (new["key"], "a")):
        answer = await house.ask("GET", "/key/info", key=key)
        assert (answer.status, answer.json["info"]["key_alias"]) == (200, alias)
    house.clock.advance(30)
    assert (await house.ask("GET", "/key/info", key=made["key"])).error["type"] == "expired_key"
    assert (await house.ask("GET", "/key/info", key=new["key"])).status == 200


@pytest_twisted.ensureDeferred
async def test_a_grace_period_prolongs_nothing(house: House) -> None:
    made = await house.make(duration="10s")
    new = (await post(house, "/key/regenerate", {"key": made["key"], "grace_period": "1h", "duration": "1d"})).json
    house.clock.advance(10)
    assert (await house.ask("GET", "/key/info", key=made["key"])).error["type"] == "expired_key"
    assert (await house.ask("GET", "/key/info", key=new["key"])).status == 200


@pytest_twisted.ensureDeferred
async def test_what_regenerate_refuses(house: House) -> None:
    made, other = await house.make(key_alias="a"), await house.make(key=OTHER, key_alias="b")
    table: list[tuple[dict[str, Any], int, str]] = [
        ({}, 400, "key"),
        ({"key": CUSTOM}, 404, "key"),
        ({"key": MASTER}, 404, "key"),
        ({"key": made["key"], "new_key": "sk-short"}, 400, "new_key"),
        ({"key": made["key"], "new_key": other["key"]}, 400, "new_key"),
        ({"key": made["key"], "new_key": made["key"]}, 400, "new_key"),
        ({"key": made["key"], "new_key": MASTER}, 400, "new_key"),
        ({"key": made["key"], "grace_period": "-1"}, 400, "grace_period"),
        ({"key": made["key"], "grace_period": "soon"}, 400, "grace_period"),
        ({"key": made["key"], "key_alias": "b"}, 400, "key_alias"),
        ({"key": made["key"], "guardrails": ["g"]}, 400, "guardrails"),
    ]
    for body, status, param in table:
        refused(await post(house, "/key/regenerate", body), status, param)
    for each, alias in ((made, "a"), (other, "b")):
        answer = await house.ask("GET", "/key/info", key=each["key"])
        assert (answer.status, answer.json["info"]["key_alias"]) == (200, alias)


@pytest_twisted.ensureDeferred
async def test_bulk_update_tells_what_failed(house: House) -> None:
    one, two = await house.make(), await house.make(key_alias="two")
    body = {
        "keys": [
            {"key": one["key"], "user_id": "u"},
            {"key": CUSTOM, "user_id": "u"},
            {"key_alias": "two", "tags": ["t"]},
            {"key": two["key"], "guardrails": ["g"]},
        ]
    }
    answer = await post(house, "/key/bulk_update", body)
    assert (answer.status, answer.json["total_requested"]) == (200, 4)
    done, failed = answer.json["successful_updates"], answer.json["failed_updates"]
    assert [(each["key"], each["key_info"]["token"]) for each in done] == [
        (one["key"], one["token"]),
        ("two", two["token"]),
    ]
    assert [each["key"] for each in failed] == [CUSTOM, two["key"]]
    assert [each["failed_reason"][:9] for each in failed] == ["Key not f", "guardrail"]
    assert ((await row(house, one["key"]))["user_id"], (await row(house, two["key"]))["tags"]) == ("u", ["t"])
    for bad in ({}, {"keys": []}, {"keys": ["x"]}, {"keys": [{}] * 501}):
        refused(await post(house, "/key/bulk_update", bad), 400, "keys")


@pytest_twisted.ensureDeferred
async def test_list(house: House) -> None:
    made = []
    for number in range(23):
        made.append(await house.make(key_alias=f"alias-{number:02}", user_id=f"u{number % 2}", team_id="t"))
        house.clock.advance(1)
    answer = await house.ask("GET", "/key/list")
    newest = [each["token"] for each in reversed(made)]
    assert answer.json == {"keys": newest[:10], "total_count": 23, "current_page": 1, "total_pages": 3}
    answer = await house.ask("GET", "/key/list?page=3&size=10")
    assert (answer.json["keys"], answer.json["current_page"]) == (newest[20:], 3)
    answer = await house.ask(
        "GET", "/key/list?size=100&sort_by=key_alias&sort_order=asc&user_id=u1&return_full_object=true"
    )
    assert [each["key_alias"] for each in answer.json["keys"]] == [f"alias-{n:02}" for n in range(1, 23, 2)]
    assert answer.json["keys"][0]["token"] == made[1]["token"]
    for query, expected in (
        ("key_alias=alias-03", [made[3]]),
        (f"key_hash={made[4]['token']}", [made[4]]),
        ("search=ALIAS-05", [made[5]]),
        ("search=nothing", []),
        ("team_id=x", []),
        ("status=blocked", []),
        ("page=9", []),
    ):
        answer = await house.ask("GET", f"/key/list?{query}")
        assert (answer.status, answer.json["keys"]) == (200, [each["token"] for each in expected]), query
    await post(house, "/key/block", {"key": made[6]["key"]})
    assert (await house.ask("GET", "/key/list?status=blocked")).json["keys"] == [made[6]["token"]]
    assert (await house.ask("GET", "/key/list?status=active")).json["total_count"] == 22
    assert made[0]["key"].encode() not in (await house.ask("GET", "/key/list?size=100&return_full_object=true")).body


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("size=101", "size"),
        ("size=0", "size"),
        ("page=0", "page"),
        ("page=x", "page"),
        ("page=99999999999999999999", "page"),
        ("sort_by=metadata", "sort_by"),
        ("sort_order=up", "sort_order"),
        ("status=deleted", "status"),
        ("organization_id=x", "organization_id"),
        ("page=1&page=2", "page"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_list_refuses_what_it_does_not_do(house: House, query: str, param: str) -> None:
    refused(await house.ask("GET", f"/key/list?{query}"), 400, param)


@pytest_twisted.ensureDeferred
async def test_aliases_and_health(house: House) -> None:
    for alias in ("b", "c", "a", None):
        made = await house.make(key_alias=alias)
    answer = await house.ask("GET", "/key/aliases?size=2")
    paging = {"total_count": 3, "current_page": 1, "total_pages": 2, "size": 2}
    assert answer.json == {"aliases": ["a", "b"], **paging}
    assert (await house.ask("GET", "/key/aliases?search=C")).json["aliases"] == ["c"]
    for key in (MASTER, made["key"]):
        answer = await house.ask("POST", "/key/health", key=key)
        assert (answer.status, answer.json) == (200, {"key": "healthy", "logging_callbacks": None})


@pytest_twisted.ensureDeferred
async def test_a_key_sees_itself_only(house: House) -> None:
    for key_type in ("default", "read_only"):
        made = await house.make(key_type=key_type, key_alias=key_type)
        other = await house.make()
        answer = await house.ask("GET", "/key/list?return_full_object=true", key=made["key"])
        assert [each["token"] for each in answer.json["keys"]] == [made["token"]]
        assert (await house.ask("GET", f"/key/list?key_hash={other['token']}", key=made["key"])).json["keys"] == []
        assert (await house.ask("GET", "/key/aliases", key=made["key"])).json["aliases"] == [key_type]
        assert (await house.ask("GET", "/key/info", key=made["key"])).status == 200
        refused(await house.ask("GET", f"/key/info?key={other['token']}", key=made["key"]), 403)
        refused(await house.ask("GET", "/audit", key=made["key"]), 403)


@pytest_twisted.ensureDeferred
async def test_key_types(house: House) -> None:
    keys = {
        name: (await house.make(key_type=name))["key"] for name in ("default", "llm_api", "read_only", "management")
    }
    table = {
        "default": (True, True, 200, 403),
        "llm_api": (True, True, 403, 403),
        "read_only": (False, True, 200, 403),
        "management": (False, False, 200, 200),
    }
    for name, (inference, info, reads, manages) in table.items():
        assert await opens(house, keys[name]) is inference
        assert await opens(house, keys[name], b"/v1/models") is info
        assert not await opens(house, keys[name], b"/sleep")
        answers = [
            await house.ask("GET", "/key/info", key=keys[name]),
            await house.ask("POST", "/key/generate", {}, key=keys[name]),
        ]
        assert [answer.status for answer in answers] == [reads, manages], name
        for answer in answers:
            assert answer.status == 200 or refused(answer, 403).startswith(
                "Virtual key is not allowed to call this route."
            )


@pytest_twisted.ensureDeferred
async def test_allowed_routes_change_at_once(house: House) -> None:
    made = await house.make(allowed_routes=["/v1/chat"])
    assert await opens(house, made["key"])
    assert not await opens(house, made["key"], b"/v1/embeddings")
    assert await opens(house, made["key"], base=b"/gpu1")
    answer = await house.ask("GET", "/key/info", key=made["key"])
    refused(answer, 403)
    await post(house, "/key/update", {"key": made["key"], "allowed_routes": ["info_routes", "admin"]})
    assert (await house.ask("GET", "/key/info", key=made["key"])).json["info"]["allowed_routes"] == [
        "info_routes",
        "admin",
    ]
    assert not await opens(house, made["key"])
    assert await opens(house, made["key"], b"/sleep")


@pytest_twisted.ensureDeferred
async def test_a_management_key_manages_ordinary_keys(house: House) -> None:
    manager = (await house.make(key_type="management", key_alias="m"))["key"]
    made = (await post(house, "/key/generate", {"key_alias": "a", "allowed_routes": ["/v1/*"]}, manager)).json
    assert made["created_by"] == hash_key(manager)
    assert await opens(house, made["key"])
    masters = await house.make(key_alias="by the master")
    for token in (made["token"], masters["token"]):
        assert (await house.ask("GET", f"/key/info?key={token}", key=manager)).status == 200
        assert (await post(house, "/key/update", {"key": token, "user_id": "u"}, manager)).json["user_id"] == "u"
        assert (await post(house, "/key/block", {"key": token}, manager)).json["updated_by"] == hash_key(manager)
    assert (await house.ask("GET", "/key/list", key=manager)).json["total_count"] == 3
    assert (await post(house, "/key/regenerate", {"key": made["token"]}, manager)).status == 200
    assert (await post(house, "/key/delete", {"key_aliases": ["a"]}, manager)).json == {"deleted_keys": ["a"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"key_type": "management"},
        {"allowed_routes": ["admin"]},
        {"allowed_routes": ["/v1/chat", "/sleep"]},
        {"allowed_routes": ["/vllm/sleep"]},
        {"allowed_routes": ["/plugin"]},
        {"allowed_routes": ["management_routes"]},
        {"allowed_routes": ["/key/*"]},
        {"allowed_routes": ["admin"], "key_type": "llm_api"},
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_management_key_gives_no_more_than_it_may(house: House, fields: dict[str, Any]) -> None:
    manager = (await house.make(key_type="management"))["key"]
    refused(await post(house, "/key/generate", fields, manager), 403)
    plain, elevated = await house.make(), await house.make(key_alias="elevated", **fields)
    refused(await post(house, "/key/update", {"key": plain["key"], **fields}, manager), 403)
    refused(await post(house, "/key/regenerate", {"key": plain["key"], **fields}, manager), 403)
    # Nor does it get hold of what the master key has given.
    for path, body in (
        ("/key/regenerate", {"key": elevated["token"]}),
        ("/key/update", {"key": elevated["token"], "duration": "-1"}),
        ("/key/update", {"key_alias": "elevated", "key_type": "default", "allowed_routes": []}),
        ("/key/block", {"key": elevated["token"]}),
        ("/key/unblock", {"key": elevated["token"]}),
        ("/key/delete", {"keys": [plain["token"], elevated["token"]]}),
    ):
        refused(await post(house, path, body, manager), 403)
    assert {name: (await row(house, elevated["token"]))[name] for name in fields} == fields
    assert (await row(house, plain["token"]))["allowed_routes"] == []
    refused(await post(house, "/key/update", {"key": manager, "duration": "-1"}, manager), 403)
    refused(await house.ask("GET", "/audit", key=manager), 403)


@pytest_twisted.ensureDeferred
async def test_a_manager_of_some_endpoints(house: House) -> None:
    manager = (await house.make(key_type="management", allowed_routes=["/key/block", "/key/regenerate"]))["key"]
    made = await house.make()
    assert (await post(house, "/key/block", {"key": made["key"]}, manager)).status == 200
    assert (await post(house, f"/key/{made['key']}/regenerate", {}, manager)).status == 200
    for path in ("/key/unblock", "/key/generate", "/key/update", "/key/delete", "/key/bulk_update"):
        refused(await post(house, path, {"key": made["key"]}, manager), 403)
    refused(await house.ask("GET", "/key/list", key=manager), 403)


@pytest_twisted.ensureDeferred
async def test_the_audit_trail(house: House) -> None:
    made = (await post(house, "/key/generate", {"key": CUSTOM, "key_alias": "a"}, X_Request_Id="req-1")).json
    manager = await house.make(key_type="management")
    house.clock.advance(5)
    await post(house, "/key/update", {"key": CUSTOM, "user_id": "u"}, manager["key"], X_Request_Id="bad id")
    await post(house, "/key/block", {"key": CUSTOM})
    new = (await post(house, "/key/regenerate", {"key": CUSTOM, "new_key": OTHER})).json
    await post(house, "/key/delete", {"keys": [OTHER]})
    await post(house, "/key/delete", {"keys": [OTHER]})
    await post(house, "/key/update", {"key": manager["key"], "guardrails": ["g"]}, manager["key"])
    await house.ask("GET", "/key/list")
    await post(house, "/key/generate", {}, key=CUSTOM)
    answer = await house.ask("GET", "/audit")
    assert (answer.status, answer.json["next"]) == (200, None)
    trail = answer.json["entries"][::-1]
    assert [(each["action"], each["status"]) for each in trail] == [
        ("/key/generate", 200),
        ("/key/generate", 200),
        ("/key/update", 200),
        ("/key/block", 200),
        ("/key/regenerate", 200),
        ("/key/delete", 200),
        ("/key/delete", 404),
        ("/key/update", 400),
    ]
    first, _, update, block, renewal, deletion, _, wrong = trail
    assert (first["actor"], first["target"], first["request_id"]) == ("master", made["token"], "req-1")
    assert (first["time"], first["before"], first["after"]["key_alias"]) == (NOW, None, "a")
    assert (update["actor"], update["time"], update["request_id"]) == (manager["token"], NOW + 5, None)
    assert (update["before"]["user_id"], update["after"]["user_id"]) == (None, "u")
    assert (block["before"]["blocked"], block["after"]["blocked"]) == (False, True)
    assert (renewal["target"], renewal["before"]["token"]) == (made["token"], made["token"])
    assert renewal["after"]["token"] == new["token"]
    assert (deletion["target"], deletion["after"]) == (new["token"], None)
    assert (wrong["actor"], wrong["before"], wrong["after"]) == (manager["token"], None, None)
    assert not [secret for secret in (CUSTOM, OTHER, MASTER, manager["key"]) if secret.encode() in answer.body]


@pytest_twisted.ensureDeferred
async def test_the_audit_trail_is_paged_and_for_the_master_key(house: House) -> None:
    made = [await house.make() for _ in range(5)]
    seen: list[str] = []
    query = "?limit=2"
    while query:
        answer = await house.ask("GET", f"/audit{query}")
        seen += [each["target"] for each in answer.json["entries"]]
        query = f"?limit=2&before={answer.json['next']}" if answer.json["next"] else ""
    assert seen == [each["token"] for each in reversed(made)]
    for bad, param in (("limit=0", "limit"), ("limit=101", "limit"), ("before=x", "before"), ("before=-1", "before")):
        refused(await house.ask("GET", f"/audit?{bad}"), 400, param)
    refused(await house.ask("GET", "/audit", key=made[0]["key"]), 403)
    assert (await house.ask("GET", "/audit", key=None)).status == 401


@pytest_twisted.ensureDeferred
async def test_a_refusal_is_told_when_the_trail_cannot_be_written(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(entry: object) -> None:
        raise StoreUnavailable

    monkeypatch.setattr(house.store, "add_audit", away)
    refused(await post(house, "/key/block", {"key": CUSTOM}), 404)


@pytest_twisted.ensureDeferred
async def test_a_store_that_fails_in_the_middle_of_a_bulk_update(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [await house.make() for _ in range(3)]
    plain, asked = house.store.change_keys, []

    async def fragile(tokens: Any, decide: Any) -> Any:
        asked.append(tokens)
        if len(asked) > 1:
            raise StoreUnavailable("10.0.0.7")
        return await plain(tokens, decide)

    monkeypatch.setattr(house.store, "change_keys", fragile)
    answer = await post(house, "/key/bulk_update", {"keys": [{"key": each["key"], "user_id": "u"} for each in made]})
    assert len(asked) == 2
    assert [len(answer.json[name]) for name in ("successful_updates", "failed_updates")] == [1, 2]
    assert b"10.0.0.7" not in answer.body


@pytest_twisted.ensureDeferred
async def test_the_same_with_sqlite(tmp_path: Path) -> None:
    """The whole way once with a store that works in threads: a decision that refuses crosses them."""
    house = House(SqliteStore(tmp_path / "keys", reactor))
    await house.open()
    try:
        made = await house.make(key_alias="a", user_id="u")
        manager = (await house.make(key_type="management"))["key"]
        refused(await post(house, "/key/generate", {"key_alias": "a"}), 400, "key_alias")
        refused(await post(house, "/key/update", {"key": manager, "duration": "-1"}, manager), 403)
        new = (await post(house, "/key/regenerate", {"key": made["key"]}, manager)).json
        assert (await house.ask("GET", "/key/info", key=new["key"])).json["info"]["key_alias"] == "a"
        assert (await house.ask("GET", "/key/info", key=made["key"])).status == 401
        assert (await house.ask("GET", "/key/list?user_id=u&sort_by=key_alias")).json["total_count"] == 1
        statuses = [each["status"] for each in (await house.ask("GET", "/audit")).json["entries"]]
        assert statuses == [200, 403, 400, 200, 200]
    finally:
        await house.close()
        await house.store.close()


@pytest.mark.parametrize("how", ["delete", "block"])
@pytest_twisted.ensureDeferred
async def test_a_key_is_revoked_though_the_caller_hangs_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    commits = hold_commits(monkeypatch)
    commits.set()
    house = House(SqliteStore(tmp_path / "keys", reactor))
    await house.open()
    try:
        key, token = (made := await house.make())["key"], made["token"]
        commits.clear()
        asked = Deferred.fromCoroutine(post(house, f"/key/{how}", {"keys": [key]} if how == "delete" else {"key": key}))
        await deferLater(reactor, 0.1)
        asked.cancel()
        with pytest.raises(ResponseNeverReceived):
            await asked
        await deferLater(reactor, 0.1)  # until the API hears of it
        assert (await maybeDeferred(house.gate.admit, token)).key_id == token
        commits.set()
        await until(lambda: house.gate._cache.get(token) is None, 5)
        with pytest.raises(AuthError):
            await maybeDeferred(house.gate.admit, token)
    finally:
        await house.close()
        await house.store.close()


@pytest.mark.parametrize("field", ["max_budget", "soft_budget"])
@pytest_twisted.ensureDeferred
async def test_a_budget_of_money_needs_prices(house: House, field: str) -> None:
    made = await house.make(max_budget_tokens=5)
    assert "--prices" in refused(await post(house, "/key/generate", {field: 1}), 400, field)
    refused(await post(house, "/key/update", {"key": made["key"], field: 1}), 400, field)
    refused(await post(house, "/key/regenerate", {"key": made["key"], field: 1}), 400, field)
    assert (await row(house, made["key"]))["max_budget_tokens"] == 5


@pytest_twisted.ensureDeferred
async def test_what_was_spent_can_be_said_with_a_key(house: House) -> None:
    made = await house.make(spend=2.5)
    assert made["spend"] == (await row(house, made["key"]))["spend"] == 2.5
    changed = (await post(house, "/key/update", {"key": made["key"], "spend": 0, "user_id": "u"})).json
    assert (changed["spend"], changed["user_id"]) == (0.0, "u")
    assert (await row(house, made["key"]))["spend"] == 0.0


@pytest_twisted.ensureDeferred
async def test_a_key_whose_spending_cannot_be_kept_is_not_made(tmp_path: Path) -> None:
    """Its answer would not show it, and nobody could make it again."""
    path = tmp_path / "keys"
    house = House(SqliteStore(path, reactor))
    await house.open()
    try:
        with sqlite3.connect(path) as connection:
            connection.execute(
                "CREATE TRIGGER no_more BEFORE INSERT ON accounts BEGIN SELECT RAISE(ABORT, 'no more'); END"
            )
            refused(await post(house, "/key/generate", {"key_alias": "a", "spend": 2.5}), 503)
            connection.execute("DROP TRIGGER no_more")
        connection.close()
        assert (await house.make(key_alias="a", spend=2.5))["spend"] == 2.5
        entries = (await house.ask("GET", "/audit")).json["entries"]
        assert [each["before"] and each["before"]["spend"] for each in entries] == [0.0, None]
    finally:
        await house.close()
        await house.store.close()


@pytest_twisted.ensureDeferred
async def test_what_is_used_while_spend_is_set_is_not_lost(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await house.make(spend=2.5)
    token, plain = made["token"], house.store.read_account
    writers = iter("ab")

    async def read_and_add(asked: str) -> Account:
        account = await plain(asked)
        await house.store.add_usage(
            next(writers), 1, [UsageEvent(time=NOW, key=token, period=round(NOW), prompt_tokens=7)]
        )
        return account

    monkeypatch.setattr(house.store, "read_account", read_and_add)
    await post(house, "/key/update", {"key": token, "spend": 1})
    answer = await post(house, f"/key/{token}/reset_spend", {"reset_to": 0.5})
    assert (answer.json["spend"], answer.json["previous_spend"]) == (0.5, 1.0)
    assert await plain(token) == Account(round(NOW), 500_000, 14)


@pytest_twisted.ensureDeferred
async def test_a_period_that_is_over_has_nothing_spent_in_it(house: House) -> None:
    made = await house.make(spend=2.5, budget_duration="30d", max_budget_tokens=5)
    assert made["budget_reset_at"] == "2023-12-14T22:13:20.000Z"
    house.clock.advance(31 * 86_400)
    shown = await row(house, made["key"])
    assert (shown["spend"], shown["budget_reset_at"]) == (0.0, "2024-01-13T22:13:20.000Z")


@pytest_twisted.ensureDeferred
async def test_another_length_of_the_period_leaves_what_is_spent(house: House) -> None:
    made = await house.make(spend=2.5, budget_duration="30d")
    house.clock.advance(20 * 86_400)
    changed = (await post(house, "/key/update", {"key": made["key"], "budget_duration": "1d"})).json
    assert (changed["spend"], changed["budget_reset_at"]) == (2.5, "2023-12-05T22:13:20.000Z")
    house.clock.advance(86_400)
    assert (await row(house, made["key"]))["spend"] == 0.0
