"""What was used, over a real socket: ``GET /usage``, who may see what, and what a key has spent."""

import csv
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from _api import CUSTOM, MASTER, NOW, Answer, House
from _stores import last_usage
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from vllmproxy.api.queries import parse_usage
from vllmproxy.errors import BadRequest
from vllmproxy.keys.key import hash_key
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import Account, UsageQuery

#: The day of ``NOW``, and those before it.
TODAY, YESTERDAY, LONG_AGO = "2023-11-14", "2023-11-13", "2023-10-15"
DAY = 86_400.0
OTHER = "sk-another-custom-key-0001"
NUMBERS = {
    "requests",
    "estimated_requests",
    "unknown_requests",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "cached_prompt_tokens",
    "audio_seconds",
    "spend",
}


@pytest_twisted.async_yield_fixture
async def house() -> AsyncIterator[House]:
    it = House()
    await it.open()
    await it.make(key=CUSTOM, key_alias="mine")
    await it.make(key=OTHER)
    await add(
        it,
        event(CUSTOM, model="a", end_user="u", prompt_tokens=10, completion_tokens=5, cached_tokens=4, spend=150_000),
        event(CUSTOM, 1, model="a", end_user="v", prompt_tokens=1, spend=1, quality="estimated"),
        event(OTHER, model="b", end_user="u", audio_ms=1500, spend=200_000, quality="unknown"),
        event("master", 30),
    )
    yield it
    await it.close()


def event(key: str, back: int = 0, **fields: Any) -> UsageEvent:
    token = key if key == "master" else hash_key(key)
    return UsageEvent(time=NOW - DAY * back, key=token, **{"period": int(NOW), **fields})


async def add(house: House, *events: UsageEvent) -> None:
    last = await last_usage(house.store, "w")
    await house.store.add_usage("w", last + 1, events)


async def usage(house: House, query: str = "", key: str = MASTER, path: str = "/usage") -> dict[str, Any]:
    answer = await house.ask("GET", f"{path}?{query}", key=key)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found


def refused(answer: Answer, status: int, param: str | None = None) -> str:
    assert answer.status == status, answer.body
    assert param is None or answer.error["param"] == param
    return answer.error["message"]


@pytest_twisted.ensureDeferred
async def test_usage_is_of_the_last_thirty_days_by_day(house: House) -> None:
    found = await usage(house)
    assert {name: found[name] for name in ("since", "until", "group_by")} == {
        "since": "2023-10-16",
        "until": TODAY,
        "group_by": ["day"],
    }
    assert [row["day"] for row in found["usage"]] == [YESTERDAY, TODAY]
    assert [set(row) for row in found["usage"]] == [NUMBERS | {"day"}] * 2
    assert found["usage"][1] == {
        "day": TODAY,
        "requests": 2,
        "estimated_requests": 0,
        "unknown_requests": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "cached_prompt_tokens": 4,
        "audio_seconds": 1.5,
        "spend": 0.35,
    }
    assert found["total"] == {
        "requests": 3,
        "estimated_requests": 1,
        "unknown_requests": 1,
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "cached_prompt_tokens": 4,
        "audio_seconds": 1.5,
        "spend": 0.350001,
    }


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("since=2023-11-14&until=2023-11-10", "since (2023-11-14) is after until (2023-11-10)."),
        ("since=2024-01-01", f"since (2024-01-01) is after until ({TODAY})."),
        (
            "since=2022-01-01&until=2023-11-14",
            "From since to until are 683 days; ask for at most 400, as many as are kept.",
        ),
        ("since=2022-10-11&until=2023-11-14", ""),
        (
            "since=2022-10-10&until=2023-11-14",
            "From since to until are 401 days; ask for at most 400, as many as are kept.",
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_days_that_are_none_or_too_many(house: House, query: str, says: str) -> None:
    answer = await house.ask("GET", f"/usage?{query}")
    assert answer.status == (400 if says else 200)
    if says:
        assert refused(answer, 400, "since") == says


@pytest_twisted.ensureDeferred
async def test_money_is_written_as_it_is(house: House) -> None:
    await add(house, *(event(CUSTOM, model=f"m{micros}", spend=micros) for micros in (1, 99, 100_001, 2**53 // 10**4)))
    answer = await house.ask("GET", "/usage?group_by=model")
    for text in (b'"spend": 1e-06}', b'"spend": 9.9e-05}', b'"spend": 0.100001}', b'"spend": 900719.925474}'):
        assert answer.body.count(text) == 1
    assert b"0000000" not in answer.body


@pytest_twisted.ensureDeferred
async def test_groups_and_filters(house: House) -> None:
    found = await usage(house, f"group_by=key,model&since={LONG_AGO}")
    mine, other = hash_key(CUSTOM), hash_key(OTHER)
    rows = {(row["key"], row["model"]): (row["requests"], row.get("key_alias", "-")) for row in found["usage"]}
    assert rows == {(mine, "a"): (2, "mine"), (other, "b"): (1, None), ("master", ""): (1, "-")}
    for query, count in (
        ("", 4),
        (f"key={CUSTOM}", 2),
        (f"key={mine}", 2),
        ("key_alias=mine", 2),
        ("key=master", 1),
        ("key=sk-nobody", 0),
        ("model=a", 2),
        ("end_user=u", 2),
        ("model=a&end_user=u", 1),
        (f"until={LONG_AGO}", 1),
        (f"until={YESTERDAY}", 2),
    ):
        found = await usage(house, f"since={LONG_AGO}&{query}")
        assert (query, found["total"]["requests"]) == (query, count)
        assert sum(row["requests"] for row in found["usage"]) == count
    refused(await house.ask("GET", "/usage?key_alias=nobody"), 404, "key_alias")
    refused(await house.ask("GET", f"/usage?key_alias=mine&key={CUSTOM}"), 400, "key_alias")


@pytest_twisted.ensureDeferred
async def test_a_deleted_key_keeps_its_sums_without_an_alias(house: House) -> None:
    await house.ask("POST", "/key/delete", {"keys": [CUSTOM]})
    (row,) = (await usage(house, f"group_by=key&key={CUSTOM}"))["usage"]
    assert (row["key"], row["requests"], "key_alias" in row) == (hash_key(CUSTOM), 2, False)


@pytest_twisted.ensureDeferred
async def test_a_key_sees_its_own_use(house: House) -> None:
    mine = hash_key(CUSTOM)
    for query in ("", f"key={CUSTOM}", f"key={mine}", "key_alias=mine"):
        found = await usage(house, f"group_by=key&{query}", key=CUSTOM)
        assert [(row["key"], row["requests"]) for row in found["usage"]] == [(mine, 2)]
        assert found["total"]["requests"] == 2
    for query in (f"key={OTHER}", f"key={hash_key(OTHER)}", "key=master", "key=sk-nobody", "key_alias=theirs"):
        assert "its own" in refused(await house.ask("GET", f"/usage?{query}", key=CUSTOM), 403)


@pytest_twisted.ensureDeferred
async def test_usage_of_one_key_has_a_path_of_its_own(house: House) -> None:
    mine = hash_key(CUSTOM)
    for key in (MASTER, CUSTOM):
        for name in (CUSTOM, mine):
            found = await usage(house, "group_by=model", key=key, path=f"/key/{name}/usage")
            assert [(row["model"], row["requests"]) for row in found["usage"]] == [("a", 2)]
    refused(await house.ask("GET", f"/key/{OTHER}/usage", key=CUSTOM), 403)
    refused(await house.ask("GET", f"/key/{CUSTOM}/usage?key={OTHER}"), 400, "key")
    assert (await house.ask("POST", f"/key/{CUSTOM}/usage", {})).status == 405


@pytest_twisted.ensureDeferred
async def test_who_may_see_usage(house: House) -> None:
    kinds: dict[str, tuple[dict[str, Any], int, int]] = {
        "sk-of-the-type-management": ({"key_type": "management"}, 200, 3),
        "sk-management-some-routes": ({"key_type": "management", "allowed_routes": ["/key/info"]}, 403, 0),
        "sk-management-with-usage-": ({"key_type": "management", "allowed_routes": ["/usage"]}, 200, 3),
        "sk-of-the-type-llm-api---": ({"key_type": "llm_api"}, 403, 0),
        "sk-of-the-type-read-only-": ({"key_type": "read_only"}, 200, 0),
        "sk-with-the-route-usage--": ({"allowed_routes": ["/usage"]}, 200, 0),
        "sk-with-info-routes------": ({"allowed_routes": ["info_routes"]}, 200, 0),
        "sk-with-inference-only---": ({"allowed_routes": ["inference"]}, 403, 0),
    }
    for key, (fields, status, count) in kinds.items():
        await house.make(key=key, **fields)
        answer = await house.ask("GET", "/usage", key=key)
        assert (key, answer.status) == (key, status)
        assert status != 200 or answer.json["total"]["requests"] == count
    assert (await house.ask("GET", "/usage", key=None)).status == 401
    assert (await house.ask("GET", "/usage", key="sk-nobody")).status == 401


@pytest_twisted.ensureDeferred
async def test_usage_needs_a_master_key() -> None:
    house = House(auth=False)
    await house.open()
    refused(await house.ask("GET", "/usage", key=None), 403)
    await house.close()


@pytest_twisted.ensureDeferred
async def test_csv(house: House) -> None:
    for query, headers in (("&format=csv", {}), ("", {"Accept": "text/csv"}), ("", {"Accept": "TEXT/CSV;q=1, */*"})):
        answer = await house.ask("GET", f"/usage?group_by=day,key{query}", headers=headers)
        assert answer.headers.getRawHeaders("content-type") == ["text/csv; charset=utf-8"]
        assert answer.body.count(b"\r\n") == 4
        rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
        assert [*rows[0]][:4] == ["day", "key", "key_alias", "requests"]
        assert set(rows[0]) == NUMBERS | {"day", "key", "key_alias"}
        (mine,) = [row for row in rows if row["day"] == TODAY and row["key"] == hash_key(CUSTOM)]
        assert (mine["key_alias"], mine["requests"], mine["total_tokens"]) == ("mine", "1", "15")
        assert (mine["audio_seconds"], mine["spend"]) == ("0.000", "0.150000")
    answer = await house.ask("GET", "/usage?format=json", headers={"Accept": "text/csv"})
    assert answer.headers.getRawHeaders("content-type") == ["application/json"]
    answer = await house.ask("GET", "/usage?format=csv&key=sk-nobody")
    assert answer.body.startswith(b"day,requests,estimated_requests,")
    assert answer.body.count(b"\r\n") == 1


HOSTILE = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "=cmd|' /C calc'!A0"]
HARMLESS = ["a=b", "x", '"quoted", with signs', "é☃", "1-2", ""]
#: What neither a spreadsheet nor a terminal is to see as it is.
UNSEEN = ["\t=1", "\r=1", "\n=1", "two\nlines", "\x1b[31mred", "\x9b31mred", "\u202etxt", "\ud800"]


@pytest_twisted.ensureDeferred
async def test_no_name_is_a_formula(house: House) -> None:
    names = [*HOSTILE, *HARMLESS, *UNSEEN]
    await add(house, *(event(OTHER, 2, model=name, end_user=name) for name in names))
    await house.make(key="sk-with-a-hostile-alias", key_alias="=alias")
    await add(house, event("sk-with-a-hostile-alias", 2, model="aliased"))
    query = "since=2023-11-12&until=2023-11-12&group_by=model,end_user,key"
    answer = await house.ask("GET", f"/usage?{query}&format=csv")
    rows = list(csv.reader(io.StringIO(answer.body.decode(), newline="")))[1:]
    written = {row[0] for row in rows}
    shown = {"".join(each if each.isprintable() else "\ufffd" for each in name) for name in UNSEEN}
    assert written == {f"'{name}" for name in HOSTILE} | {*HARMLESS, *shown, "aliased"}
    assert all(row[0] == row[1] for row in rows if row[0] != "aliased")
    assert [row[3] for row in rows if row[0] == "aliased"] == ["'=alias"]
    assert not [cell for row in rows for cell in row if cell.strip(" ")[:1] in {*"=+-@\t\r\n"} - {""}]
    # JSON is for programs, which get what was sent.
    found = await usage(house, query)
    assert {row["model"] for row in found["usage"]} == {*names, "aliased"}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=2023-11-15", "since"),
        ("until=2022-01-01&since=2022-01-02", "since"),
        ("since=2022-10-10", "since"),
        ("since=yesterday", "since"),
        ("since=20231101", "since"),
        ("since=2023-W45-1", "since"),
        ("since=2023-02-30", "since"),
        ("until=2023-11-14T00:00", "until"),
        ("until=%D9%A2023-11-14", "until"),
        ("group_by=hour", "group_by"),
        ("group_by=day,day", "group_by"),
        ("group_by=day,,key", "group_by"),
        ("format=xml", "format"),
        ("nonsense=1", "nonsense"),
        ("model=a&model=b", "model"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_cannot_be_meant_is_refused(house: House, query: str, param: str) -> None:
    refused(await house.ask("GET", f"/usage?{query}"), 400, param)


def test_what_is_asked_as_a_value() -> None:
    asked = parse_usage(b"/usage?group_by=end_user,day&since=2022-10-11&end_user=%e2%98%83", NOW, "*/*")
    query = UsageQuery(since="2022-10-11", until=TODAY, end_user="☃", group_by=("end_user", "day"))
    assert (asked.query, asked.key_alias, asked.csv) == (query, None, False)
    assert parse_usage(b"/usage?until=0001-01-02", NOW, "").query.since == "0001-01-01"
    assert parse_usage(b"/key/x/usage", NOW, "", CUSTOM).query.key == hash_key(CUSTOM)
    with pytest.raises(BadRequest):
        parse_usage(b"/usage?since=2022-10-10", NOW, "")


@pytest_twisted.ensureDeferred
async def test_many_rows_let_others_have_their_turn(house: House) -> None:
    count = 1700
    await add(house, *(event(OTHER, 2 + n % 2, end_user=f"u{n // 2}", spend=n) for n in range(count)))
    asking = Deferred.fromCoroutine(usage(house, f"group_by=day,end_user&key={OTHER}&until=2023-11-12"))
    turns = 0
    while not asking.called:
        await deferLater(reactor, 0.005)
        turns += bool(house.clock.getDelayedCalls())
        house.clock.advance(0)
    found = await asking
    assert turns
    assert len(found["usage"]) == count
    assert found["usage"] == sorted(found["usage"], key=lambda row: (row["day"], row["end_user"]))
    assert found["total"]["requests"] == count


@pytest_twisted.ensureDeferred
async def test_too_many_rows_are_refused(house: House) -> None:
    for key in range(11):
        await add(house, *(event(f"sk-{key}", end_user=f"u{n}") for n in range(1000)))
    assert "fewer days" in refused(await house.ask("GET", "/usage?group_by=key,end_user"), 400, "group_by")
    assert (await usage(house, "group_by=key"))["total"]["requests"] == 11_003


@pytest_twisted.ensureDeferred
async def test_a_store_that_is_away_is_503(house: House) -> None:
    house.store.fault = StoreUnavailable()
    assert (await house.ask("GET", "/usage?group_by=key")).status == 503


@pytest_twisted.ensureDeferred
async def test_rows_say_what_a_key_has_spent(house: House) -> None:
    mine = hash_key(CUSTOM)
    assert (await house.ask("GET", f"/key/info?key={CUSTOM}")).json["info"]["spend"] == 0.150001
    assert (await house.ask("GET", "/key/info", key=OTHER)).json["info"]["spend"] == 0.2
    listed = (await house.ask("GET", "/key/list?return_full_object=true")).json["keys"]
    assert {row["token"]: row["spend"] for row in listed} == {mine: 0.150001, hash_key(OTHER): 0.2}
    for path, body in (("update", {"user_id": "u"}), ("block", {}), ("unblock", {})):
        answer = await house.ask("POST", f"/key/{path}", {"key": CUSTOM, **body})
        assert answer.json["spend"] == 0.150001
    assert (await house.make())["spend"] == 0.0


@pytest.mark.parametrize("grace", [None, "1h"])
@pytest_twisted.ensureDeferred
async def test_a_regenerated_key_has_spent_what_it_had(house: House, grace: str | None) -> None:
    made = (await house.ask("POST", f"/key/{CUSTOM}/regenerate", {"grace_period": grace})).json
    assert made["spend"] == 0.150001
    assert (await house.ask("GET", "/key/info", key=made["key"])).json["info"]["spend"] == 0.150001
    assert await house.store.read_account(hash_key(CUSTOM)) == (Account(int(NOW), 150_001, 16) if grace else Account())
    # What was used stays with the key that used it.
    assert (await usage(house, key=made["key"]))["total"]["requests"] == 0


@pytest_twisted.ensureDeferred
async def test_a_deleted_key_that_is_made_again_has_spent_nothing(house: House) -> None:
    await house.ask("POST", "/key/delete", {"keys": [CUSTOM]})
    await house.make(key=CUSTOM)
    assert (await house.ask("GET", "/key/info", key=CUSTOM)).json["info"]["spend"] == 0.0


@pytest_twisted.ensureDeferred
async def test_reset_spend(house: House) -> None:
    mine = hash_key(CUSTOM)
    await add(house, event(CUSTOM, spend=7_349_999, prompt_tokens=5))
    answer = await house.ask("POST", f"/key/{CUSTOM}/reset_spend", {"reset_to": 0.1})
    row = answer.json
    assert (row["token"], row["key_alias"], row["spend"], row["previous_spend"]) == (mine, "mine", 0.1, 7.5)
    assert await house.store.read_account(mine) == Account(int(NOW), 100_000, 21)
    assert (await house.ask("POST", f"/key/{mine}/reset_spend", {"reset_to": 0})).json["spend"] == 0.0
    assert (await house.ask("GET", f"/key/info?key={mine}")).json["info"]["spend"] == 0.0
    entries = (await house.ask("GET", "/audit?limit=2")).json["entries"]
    told = [(each["action"], each["target"], each["before"]["spend"], each["after"]["spend"]) for each in entries]
    assert told == [("/key/reset_spend", mine, 0.1, 0.0), ("/key/reset_spend", mine, 7.5, 0.1)]
    # The sums stay what they were.
    assert (await usage(house, f"key={mine}"))["total"]["spend"] == 7.5


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "reset_to"),
        ({"reset_to": None}, "reset_to"),
        ({"reset_to": -0.01}, "reset_to"),
        ({"reset_to": "1"}, "reset_to"),
        ({"reset_to": True}, "reset_to"),
        ({"reset_to": 2_000_000}, "reset_to"),
        ({"reset_to": 1e300}, "reset_to"),
        ({"reset_to": 0, "more": 1}, "more"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_reset_spend_takes_an_amount(house: House, body: dict[str, Any], param: str) -> None:
    refused(await house.ask("POST", f"/key/{CUSTOM}/reset_spend", body), 400, param)
    assert await house.store.read_account(hash_key(CUSTOM)) == Account(int(NOW), 150_001, 16)
    (entry,) = (await house.ask("GET", "/audit?limit=1")).json["entries"]
    assert (entry["action"], entry["status"]) == ("/key/reset_spend", 400)


@pytest_twisted.ensureDeferred
async def test_who_may_reset_spend(house: House) -> None:
    manager, above = "sk-that-manages-keys", "sk-that-manages-as-well"
    for key in (manager, above):
        await house.make(key=key, key_type="management")
    refused(await house.ask("POST", "/key/sk-nobody/reset_spend", {"reset_to": 0}), 404, "key")
    refused(await house.ask("POST", f"/key/{CUSTOM}/reset_spend", {"reset_to": 0}, key=CUSTOM), 403)
    refused(await house.ask("POST", f"/key/{above}/reset_spend", {"reset_to": 0}, key=manager), 403)
    assert (await house.ask("POST", f"/key/{CUSTOM}/reset_spend", {"reset_to": 0}, key=manager)).status == 200
