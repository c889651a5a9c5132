import json
import re
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.api.fields import new_key, parse_delete, parse_generate, parse_object, row_of, token_of
from vllmproxy.api.values import refuse_unknown
from vllmproxy.errors import BadRequest
from vllmproxy.keys.key import hash_key

NOW = 1_700_000_000.0
CUSTOM = "sk-0123456789abc"


@pytest.mark.parametrize("body", [b"", b" \n", b"{}", b" {} "])
def test_an_empty_body_is_an_empty_object(body: bytes) -> None:
    assert parse_object(body) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": "\\ud800"}',
        b'{"metadata": {"\\udfff": 1}}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"JSON"):
        parse_object(body)


@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    with suppress(BadRequest):
        assert isinstance(parse_object(body), dict)


def test_everything_taken_comes_back_in_the_row() -> None:
    wanted = parse_generate(
        {
            "key": CUSTOM,
            "key_alias": "équipe a",
            "user_id": "u",
            "team_id": "t",
            "metadata": {"a": [1, {"b": None}]},
            "tags": ["x", "y", "x"],
            "blocked": True,
            "duration": "1h",
            "key_type": "llm_api",
            "allowed_routes": ["/v1/chat/*", "info", "/v1/chat/*"],
            "models": ["m", "n*", "m"],
            "aliases": {"fast": "m"},
            "tpm_limit": 1000,
            "model_rpm_limit": {"m": 1},
            "model_tpm_limit": {"m": 0},
            "max_budget": 12.5,
            "soft_budget": 0.0000001,
            "max_budget_tokens": 7,
            "budget_duration": "30d",
            "spend": 1,
            # Restrictions that are left open are no restrictions.
            "permissions": {},
            "auto_rotate": False,
        },
        NOW,
    )
    key = new_key(wanted, CUSTOM, NOW, "master")
    assert (key.token, key.key_name) == (hash_key(CUSTOM), "sk-...9abc")
    row = row_of(key, NOW)
    assert row["expires"] == "2023-11-14T23:13:20.000Z"
    assert row["created_at"] == row["updated_at"] == "2023-11-14T22:13:20.000Z"
    assert row["created_by"] == row["updated_by"] == "master"
    assert (row["key_alias"], row["user_id"], row["team_id"]) == ("équipe a", "u", "t")
    assert (row["metadata"], row["tags"], row["blocked"]) == ({"a": [1, {"b": None}]}, ["x", "y"], True)
    assert (row["key_type"], row["allowed_routes"]) == ("llm_api", ["/v1/chat/*", "info"])
    assert (row["models"], row["aliases"]) == (["m", "n*"], {"fast": "m"})
    assert (row["tpm_limit"], row["model_rpm_limit"], row["model_tpm_limit"]) == (1000, {"m": 1}, {"m": 0})
    assert (row["max_budget"], row["soft_budget"], row["max_budget_tokens"]) == (12.5, 0.0, 7)
    assert (row["budget_duration"], row["budget_reset_at"]) == ("30d", "2023-12-14T22:13:20.000Z")
    assert wanted.spend == 1_000_000
    assert "token" not in row
    assert CUSTOM not in json.dumps(row) + repr(wanted) + repr(key)


def test_nothing_asked_for_is_a_plain_key() -> None:
    wanted = parse_generate({}, NOW)
    row = row_of(new_key(wanted, CUSTOM, NOW, None), NOW)
    assert (row["key_alias"], row["expires"], row["blocked"], row["metadata"], row["tags"]) == (
        None,
        None,
        False,
        {},
        [],
    )
    assert parse_generate({"duration": "-1"}, NOW).fields == {"expires": None}
    nulls = {"duration": None, "key_alias": "", "key": "", "blocked": None, "allowed_routes": None, "key_type": None}
    assert row_of(new_key(parse_generate(nulls, NOW), CUSTOM, NOW, None), NOW) == row
    assert parse_generate({"duration": ""}, NOW).fields == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("models", "m"),
        ("models", ["a*b"]),
        ("models", ["all-team-models"]),
        ("models", [f"m{number}" for number in range(129)]),
        ("aliases", ["a"]),
        ("aliases", {"a": 1}),
        ("aliases", {"a": ""}),
        ("aliases", {"a\n": "b"}),
        ("max_budget", -0.01),
        ("max_budget", "10"),
        ("max_budget", True),
        ("max_budget", 1e300),
        ("max_budget_tokens", 1.5),
        ("soft_budget", -1),
        ("budget_duration", "0s"),
        ("budget_duration", 30),
        ("tpm_limit", -1),
        ("tpm_limit", "5"),
        ("model_rpm_limit", 1),
        ("model_rpm_limit", {"m": -1}),
        ("model_tpm_limit", {"m": "1"}),
        ("spend", -1),
        ("allowed_routes", "/x"),
        ("allowed_routes", ["x"]),
        ("allowed_routes", ["/x", "openai_routes"]),
        ("allowed_routes", ["/x?y"]),
        ("allowed_routes", [f"/{number}" for number in range(129)]),
        ("key_type", "internal"),
        ("key_type", 3),
        ("rpm_limit", -1),
        ("rpm_limit", True),
        ("max_parallel_requests", 1.5),
        ("model_max_budget", {"m": 1}),
        ("permissions", {"a": True}),
        ("guardrails", ["g"]),
        ("auto_rotate", True),
        ("unheard_of", None),
        ("key_alias", 3),
        ("key_alias", "a\nb"),
        ("key_alias", "a\x00b"),
        ("key_alias", "a" * 256),
        ("user_id", ["u"]),
        ("team_id", {}),
        ("metadata", []),
        ("metadata", "x"),
        ("tags", "x"),
        ("tags", [1]),
        ("tags", [""]),
        ("blocked", 1),
        ("blocked", "true"),
        ("duration", 30),
        ("duration", "soon"),
        ("duration", "0s"),
        ("key", 7),
        ("key", "sk-0123456789ab"),
        ("key", "pk-0123456789abcdef"),
        ("key", "sk-0123456789 abcdef"),
        ("key", "sk-0123456789abcdef\n"),
        ("key", "sk-0123456789abcdeé"),
        ("key", "sk-" + "a" * 253),
    ],
)
def test_a_field_that_is_refused_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_generate({name: value}, NOW)
    assert caught.value.param == name
    assert name.replace("_", " ") in caught.value.message.replace("_", " ")
    assert "0123456789" not in caught.value.message


def test_delete() -> None:
    wanted = parse_delete({"keys": ["sk-a", "sk-a"], "key_aliases": ["b"]})
    assert (wanted.keys, wanted.aliases) == (("sk-a",), ("b",))
    assert "sk-a" not in repr(wanted)
    for body in ({}, {"keys": []}, {"keys": "sk-a"}, {"keys": [None]}, {"token": "x"}):
        with pytest.raises(BadRequest):
            parse_delete(body)


def test_a_key_is_named_by_itself_or_by_its_hash() -> None:
    assert token_of(CUSTOM) == hash_key(CUSTOM)
    assert token_of(hash_key(CUSTOM)) == hash_key(CUSTOM)
    assert token_of("é") == hash_key("é")


@pytest.mark.parametrize("metadata", [{"a": "x" * 20_000}, {"a": [[[[[[]]]]]] * 5_000}])
def test_metadata_is_bounded(metadata: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="metadata"):
        parse_generate({"metadata": metadata}, NOW)


@pytest.mark.parametrize("body", [b"[" * 100 + b"]" * 100, b'{"metadata":' + b'{"a":' * 40 + b"1" + b"}" * 41])
def test_deep_nesting_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_object(body)


@pytest.mark.parametrize(("name", "said"), [("alias", " Did you mean 'key_alias'?"), ("colour", "")])
def test_a_name_that_is_near_one_that_there_is(name: str, said: str) -> None:
    with pytest.raises(BadRequest, match=f"^Unknown field '{name}'\\.{re.escape(said)}$"):
        refuse_unknown({name: 1}, {"key_alias", "rpm_limit"})


@pytest.mark.parametrize(
    ("name", "meant"), [("rpm", "rpm_limit"), ("tpm", "tpm_limit"), ("budget", "max_budget"), ("expires", None)]
)
def test_a_field_is_taken_for_one_that_is_enforced(name: str, meant: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_generate({name: 1}, NOW)
    assert caught.value.message == f"Unknown field {name!r}." + (f" Did you mean {meant!r}?" if meant else "")
