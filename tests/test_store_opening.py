"""Store URLs: what each opens, what is refused, and that no password is ever repeated."""

from pathlib import Path

import pytest
from twisted.internet.task import Clock

from vllmproxy.store.address import RedisAddress, parse_redis_url
from vllmproxy.store.memory import MemoryStore
from vllmproxy.store.opening import make_store
from vllmproxy.store.redis import RedisStore
from vllmproxy.store.sqlite import SqliteStore

CANARY = "canary-s3cret"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory:", MemoryStore),
        ("sqlite:/somewhere/keys.sqlite3", SqliteStore),
        ("sqlite:keys.sqlite3", SqliteStore),
        ("redis://localhost", RedisStore),
        ("rediss://localhost/3?ca=/ca.pem", RedisStore),
        ("unix:///run/redis.sock?db=1", RedisStore),
        ("redis+sentinel://one,two/mymaster", RedisStore),
    ],
)
def test_each_form_makes_its_store(url: str, kind: type, tmp_path: Path) -> None:
    assert isinstance(make_store(url, reactor=Clock(), state_directory=tmp_path / "state"), kind)
    assert list(tmp_path.iterdir()) == []  # nothing is touched before open()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", RedisAddress(host="h")),
        ("redis://h:7000/5", RedisAddress(host="h", port=7000, database=5)),
        ("redis://h?db=4", RedisAddress(host="h", database=4)),
        ("redis://[::1]:7000", RedisAddress(host="::1", port=7000)),
        ("redis://:p%40%2F%C3%A9@h", RedisAddress(host="h", password="p@/é")),
        ("redis://me:pw@h/", RedisAddress(host="h", username="me", password="pw")),
        ("rediss://h", RedisAddress(host="h", tls=True)),
        ("rediss://h/1?ca=/a%20b.pem", RedisAddress(host="h", database=1, tls=True, ca=Path("/a b.pem"))),
        (
            "redis+sentinel://one,two:7000/my%20master",
            RedisAddress(sentinels=(("one", 26379), ("two", 7000)), service="my master"),
        ),
        (
            "redis+sentinel://me:p,%40@[::1]:1,one,[::2]/m/3",
            RedisAddress(
                sentinels=(("::1", 1), ("one", 26379), ("::2", 26379)),
                service="m",
                database=3,
                username="me",
                password="p,@",
            ),
        ),
        ("redis+sentinel://one/m?db=4", RedisAddress(sentinels=(("one", 26379),), service="m", database=4)),
        (
            "rediss+sentinel://:pw@one/m?ca=/ca.pem",
            RedisAddress(sentinels=(("one", 26379),), service="m", password="pw", tls=True, ca=Path("/ca.pem")),
        ),
        ("unix:///run/r.sock", RedisAddress(path="/run/r.sock")),
        ("unix://me:pw@/r.sock?db=2", RedisAddress(path="/r.sock", database=2, username="me", password="pw")),
    ],
)
def test_redis_urls(url: str, expected: RedisAddress) -> None:
    assert parse_redis_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory:x",
        "sqlite",
        "sqlite:",
        "sqlite://host/x",
        "sqlite:a\0b",
        "postgres://x",
        CANARY,
        f"http://:{CANARY}@h",
        "redis:",
        "redis:h",
        "redis://",
        f"redis://:{CANARY}",
        f"redis://:{CANARY}@",
        f"redis://:{CANARY}@h:port",
        f"redis://:{CANARY}@h:70000",
        f"redis://:{CANARY}@h/zero",
        f"redis://:{CANARY}@h/-1",
        f"redis://:{CANARY}@h/٣",
        f"redis://:a/{CANARY}@h",
        f"redis://:a?{CANARY}@h",
        f"redis://:a#{CANARY}@h",
        f"redis://{CANARY}@h",
        f"redis://h?password={CANARY}",
        "redis://h?ca=/ca.pem",
        f"redis://[{CANARY}@h",
        f"unix://h/{CANARY}",
        f"redis+sentinel://:{CANARY}@h",
        f"redis+sentinel://:{CANARY}@h/",
        f"redis+sentinel://:{CANARY}@/m",
        f"redis+sentinel://:{CANARY}@h,/m",
        f"redis+sentinel://:{CANARY}@,h/m",
        f"redis+sentinel://:pw@h,h:{CANARY}/m",
        f"redis+sentinel://:pw@h,[{CANARY}/m",
        f"redis+sentinel://:pw@h/m/{CANARY}",
        f"redis+sentinel://:a/{CANARY}@h,h/m",
        f"redis+sentinel://{CANARY}@h,h/m",
        f"redis+sentinel://h/m?password={CANARY}",
        "redis+sentinel://h/m?ca=/ca.pem",
        "unix:///",
        f"unix:///r.sock?password={CANARY}",
    ],
)
def test_a_bad_url_is_one_sentence_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w+ \w+") as caught:
        make_store(url, reactor=Clock())
    shown = "".join(map(str, (caught.value, caught.value.__cause__ or "")))
    assert "canary" not in shown
    assert "\n" not in shown
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{CANARY}@h", "redis://h:6379/0"),
        (f"rediss://me:{CANARY}@[::1]:7/2?ca=/x", "rediss://[::1]:7/2"),
        (f"unix://me:{CANARY}@/r.sock?db=2", "unix:///r.sock?db=2"),
        (f"redis+sentinel://me:{CANARY}@h,[::1]:7/m", "redis+sentinel://h:26379,[::1]:7/m/0"),
        (f"rediss+sentinel://:{CANARY}@h/m/2?ca=/x", "rediss+sentinel://h:26379/m/2"),
    ],
)
def test_an_address_is_shown_without_user_and_password(url: str, shown: str) -> None:
    assert str(parse_redis_url(url)) == shown


def test_an_address_does_not_show_its_password() -> None:
    address = parse_redis_url(f"redis://me:{CANARY}@h")
    assert CANARY not in f"{address} {address!r}"
