"""``vllmproxy keys`` against a real proxy."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import ask, make_key
from _cli import Asked, Ended, Said, fake_server, in_terminal, key_file, vllmproxy, without_styles
from _service import MASTER_KEY, Twistd, start_proxy
from rich.cells import cell_len

HELLO = "/vllm/v1/models"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Twistd]:
    """A proxy without keys, and without a vLLM."""
    service = start_proxy(tmp_path, "http://127.0.0.1:9")
    yield service
    service.stop()
    assert "Traceback" not in service.log


def done(ended: Ended) -> Ended:
    assert (ended.status, ended.err) == (0, "")
    return ended


def token(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def works(proxy: Twistd, key: str) -> bool:
    return ask(proxy, "GET", HELLO, key=key).status == 200


def test_the_life_of_a_key(proxy: Twistd) -> None:
    url = proxy.url
    made = done(vllmproxy("keys", "create", "--alias", "cli-life", "--rpm", "60", "--quiet", url=url))
    key = made.out.removesuffix("\n")
    assert works(proxy, key)

    shown = done(vllmproxy("keys", "show", "cli-life", "--json", url=url)).json
    assert (shown["token"], shown["rpm_limit"]) == (token(key), 60)

    changes = ("--parallel", "2", "--clear", "rpm_limit")
    updated = done(vllmproxy("keys", "update", "cli-life", *changes, "--json", url=url)).json
    assert (updated["rpm_limit"], updated["max_parallel_requests"]) == (None, 2)

    assert done(vllmproxy("keys", "block", "cli-life", url=url)).out == "'cli-life' is blocked.\n"
    assert not works(proxy, key)
    assert done(vllmproxy("keys", "unblock", "cli-life", url=url)).out == "'cli-life' is no longer blocked.\n"
    assert works(proxy, key)

    new = done(vllmproxy("keys", "rotate", "cli-life", "--grace", "1h", "--quiet", url=url)).out.strip()
    assert new != key
    assert works(proxy, key)
    assert works(proxy, new)
    assert done(vllmproxy("keys", "rotate", "cli-life", "--json", url=url)).json["key_alias"] == "cli-life"
    assert not works(proxy, new)

    gone = done(vllmproxy("keys", "delete", "cli-life", token(key), url=url))
    assert gone.out == f"'cli-life' is deleted.\n{token(key)[:16]}... is deleted.\n"
    assert not works(proxy, key)


def test_a_key_that_is_rotated_with_grace_is_named_with_its_end(proxy: Twistd) -> None:
    old = make_key(proxy, key_alias="cli-grace", duration="30m")["key"]
    out = done(vllmproxy("keys", "rotate", "cli-grace", "--grace", "2h", url=proxy.url)).out
    row = done(vllmproxy("keys", "show", token(old), "--json", url=proxy.url)).json
    end = row["expires"][:19].replace("T", " ")  # the 30 minutes: grace prolongs nothing
    (said,) = [line for line in out.splitlines() if line.startswith("The old key")]
    assert said == f"The old key, sk-...{old[-4:]}, works until {end} UTC. What ends it before:"
    assert f"  vllmproxy keys delete {token(old)}\n" in out
    done(vllmproxy("keys", "delete", "cli-grace", url=proxy.url))
    assert works(proxy, old)
    done(vllmproxy("keys", "delete", token(old), url=proxy.url))
    assert not works(proxy, old)


def test_a_new_key_is_shown_though_the_old_one_cannot_be_asked_for() -> None:
    def answer(asked: Asked) -> Said:
        return Said({"key": "sk-the-new-one"}) if asked.method == "POST" else Said({"error": {"message": "no"}}, 503)

    with fake_server(answer) as server:
        out = done(vllmproxy("keys", "rotate", "0" * 64, "--grace", "2h", url=server.url)).out
    assert out.startswith("sk-the-new-one\n")
    assert "The old key goes on working for the time of --grace. What ends it before:" in out
    assert out.endswith(f"  vllmproxy keys delete {'0' * 64}\n")


def test_a_key_that_is_rotated_without_grace_is_not_named(proxy: Twistd) -> None:
    make_key(proxy, key_alias="cli-no-grace")
    assert "old key" not in done(vllmproxy("keys", "rotate", "cli-no-grace", url=proxy.url)).out


def test_a_new_key_is_shown_with_its_row(proxy: Twistd) -> None:
    out = done(vllmproxy("keys", "create", "--metadata", '{"for": "blue"}', "--duration", "30d", url=proxy.url)).out
    key = out.splitlines()[0]
    assert works(proxy, key)
    assert out.count(key) == 1
    assert "This is the only time the key is shown." in out
    rows = dict(line.split(None, 1) for line in out.splitlines()[4:])
    assert rows["token"] == token(key)
    assert rows["metadata"] == '{"for": "blue"}'
    assert rows["status"] == "active"
    assert rows["expires"].endswith(" UTC")
    made = done(vllmproxy("keys", "create", "--json", url=proxy.url)).json
    assert made["token"] == token(made["key"])


def test_a_custom_key_comes_from_a_file(proxy: Twistd, tmp_path: Path) -> None:
    own = key_file(tmp_path / "own", "sk-chosen-by-the-operator-17")
    out = done(vllmproxy("keys", "create", "--custom-key-file", own, "--quiet", url=proxy.url)).out
    assert out == "sk-chosen-by-the-operator-17\n"
    other = key_file(tmp_path / "other", "sk-chosen-by-the-operator-18")
    name = token("sk-chosen-by-the-operator-17")
    out = done(vllmproxy("keys", "rotate", name, "--custom-key-file", other, "--quiet", url=proxy.url)).out
    assert out == "sk-chosen-by-the-operator-18\n"


def test_a_key_is_named_by_itself_on_standard_input_and_not_passed_on(proxy: Twistd) -> None:
    key = make_key(proxy, key_alias="cli-secret")["key"]
    done(vllmproxy("keys", "block", "-", url=proxy.url, stdin=f"{key}\n"))
    shown = vllmproxy("keys", "show", key, url=proxy.url)
    assert "blocked" in shown.out
    assert shown.err.startswith("vllmproxy: A key on the command line is seen by other users")
    assert key not in shown.out + shown.err
    assert done(vllmproxy("keys", "delete", "-", url=proxy.url, stdin=key)).out == f"sk-...{key[-4:]} is deleted.\n"
    assert "no key in it" in vllmproxy("keys", "show", "-", url=proxy.url).failure


def test_keys_that_are_not_there(proxy: Twistd) -> None:
    assert vllmproxy("keys", "show", "cli-nobody", url=proxy.url).failure == (
        "There is no key with the alias 'cli-nobody'; 'vllmproxy keys list' shows those there are."
    )
    assert vllmproxy("keys", "show", "0" * 64, url=proxy.url).failure == "Key not found in database."
    assert "nothing was deleted" in vllmproxy("keys", "delete", "cli-nobody", url=proxy.url).failure
    assert "names no key" in vllmproxy("keys", "show", "", url=proxy.url).failure

    make_key(proxy, key_alias="cli-somebody")
    some = vllmproxy("keys", "delete", "cli-somebody", "cli-nobody", url=proxy.url)
    assert (some.status, some.out) == (1, "'cli-somebody' is deleted.\n")
    assert some.err == "vllmproxy: There is no key 'cli-nobody'.\n"


def test_the_api_s_own_sentences_are_shown(proxy: Twistd) -> None:
    make_key(proxy, key_alias="cli-taken")
    taken = vllmproxy("keys", "create", "--alias", "cli-taken", url=proxy.url).failure
    assert taken == "Key alias 'cli-taken' is taken by another key; aliases are unique."
    assert "duration" in vllmproxy("keys", "create", "--duration", "soon", url=proxy.url).failure
    assert "sort_by" in vllmproxy("keys", "list", "--sort", "beauty", url=proxy.url).failure


def test_who_may_not_is_told_so(proxy: Twistd, tmp_path: Path) -> None:
    virtual = make_key(proxy)["key"]
    forbidden = vllmproxy("keys", "create", "--key-file", key_file(tmp_path / "key", virtual), url=proxy.url).failure
    assert forbidden.startswith("Virtual key is not allowed to call this route.")
    wrong = vllmproxy("keys", "list", url=proxy.url, key="sk-wrong-0123456789").failure
    assert wrong.startswith("Authentication Error, Invalid proxy server token passed.")
    assert wrong.endswith("Check the key in --key-file or VLLMPROXY_MASTER_KEY.")
    none = vllmproxy("keys", "list", url=proxy.url, key=None).failure
    assert none.endswith("Give the key with --key-file or VLLMPROXY_MASTER_KEY.")
    assert done(vllmproxy("keys", "list", url=proxy.url, key=None, LITELLM_MASTER_KEY=MASTER_KEY))


def test_all_pages_are_listed_and_filters_are_passed_on(fresh: Twistd) -> None:
    url = fresh.url
    assert done(vllmproxy("keys", "list", url=url)).out == "There are no keys.\n"
    tokens = [make_key(fresh, user_id=f"u{number % 2}")["token"] for number in range(205)]
    listed = done(vllmproxy("keys", "list", "--json", url=url)).json
    assert [row["token"] for row in listed["keys"]] == tokens[::-1]
    assert listed["total_count"] == 205
    odd = done(vllmproxy("keys", "list", "--user", "u1", "--order", "asc", "--json", url=url)).json
    assert [row["token"] for row in odd["keys"]] == tokens[1::2]
    assert done(vllmproxy("keys", "list", "--status", "blocked", url=url)).out == "No keys match.\n"
    table = done(vllmproxy("keys", "list", url=url)).out.splitlines()
    assert len(table) == 206


def test_the_table_fits_its_terminal_and_says_what_it_leaves_out(fresh: Twistd) -> None:
    make_key(fresh, key_alias="[red]bob[/red] :smile:", duration="30d", rpm_limit=1_000_000)
    make_key(
        fresh,
        key_alias="a-long-alias-for-somebody-in-a-department-far-away",
        key_type="management",
        max_parallel_requests=4,
        user_id="bob@example.com",
        team_id="platform",
    )
    make_key(fresh, blocked=True, key_alias="日本語の別名は二倍の幅です")
    for columns in (80, 120):
        shown = in_terminal("keys", "list", url=fresh.url, columns=columns)
        assert shown.status == 0
        text = without_styles(shown.out)
        assert "\x1b" not in text
        assert max(map(cell_len, text.splitlines())) <= columns
        assert "1,000,000" in text
        assert "EXPIRES (UTC)" in text
        assert ("No room for: " in text) == (columns == 80)
        assert ("platform" in text) == (columns == 120)
    wide = without_styles(in_terminal("keys", "list", "--wide", url=fresh.url, columns=80).out)
    assert all(row["token"] in wide for row in vllmproxy("keys", "list", "--json", url=fresh.url).json["keys"])
    piped = done(vllmproxy("keys", "list", url=fresh.url)).out
    assert "\x1b" not in piped
    assert "a-long-alias-for-somebody-in-a-department-far-away" in piped
    assert "[red]bob[/red] :smile:" in piped


@pytest.mark.parametrize(("typed", "deleted"), [("y\n", True), ("\n", False), ("n\n", False)])
def test_a_person_is_asked_before_a_key_is_deleted(proxy: Twistd, typed: str, deleted: bool) -> None:
    key = make_key(proxy, key_alias=f"cli-asked-{typed.strip()}")
    ended = in_terminal("keys", "delete", key["key_alias"], url=proxy.url, columns=80, prompt="[y/N] ", typed=typed)
    assert f"Delete '{key['key_alias']}' for good? [y/N]" in ended.out
    assert ("is deleted." in ended.out) == deleted
    assert ("Nothing was deleted." in ended.out) != deleted
    assert ended.status == (0 if deleted else 1)
    assert works(proxy, key["key"]) != deleted
    if not deleted:
        assert in_terminal("keys", "delete", "--yes", key["key_alias"], url=proxy.url, columns=80).status == 0


def test_a_key_that_is_typed_is_not_echoed(proxy: Twistd) -> None:
    key = make_key(proxy)["key"]
    ended = in_terminal("keys", "show", "-", url=proxy.url, columns=80, prompt="Key: ", typed=f"{key}\n")
    assert ended.status == 0
    assert token(key) in ended.out
    assert key not in ended.out


def test_over_a_unix_socket(tmp_path: Path) -> None:
    socket = tmp_path / "http"
    service = start_proxy(tmp_path / "proxy", "http://127.0.0.1:9", "--listen", f"unix:{socket}")
    try:
        assert done(vllmproxy("keys", "list", "--url", f"unix:{socket}")).out == "There are no keys.\n"
    finally:
        service.stop()
