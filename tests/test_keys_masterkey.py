import pytest

from vllmproxy.keys.key import hash_key
from vllmproxy.keys.masterkey import MasterKey, weakness

KEY = "sk-Zq3v9WmT1xYc8LbNfR5d"


def test_matches_only_itself() -> None:
    master = MasterKey(KEY)
    assert master.matches_token(hash_key(KEY))
    assert MasterKey(KEY.encode()).matches_token(hash_key(KEY))
    for other in ("", KEY[:-1], KEY + "\n", hash_key(KEY)):
        assert not master.matches_token(hash_key(other))


def test_repr_hides_the_key_and_its_hash() -> None:
    shown = f"{MasterKey(KEY)!r} {MasterKey(KEY)}"
    assert KEY not in shown
    assert hash_key(KEY) not in shown


@pytest.mark.parametrize(
    "key",
    [
        "",
        "sk-",
        "sk-1234",
        "sk-12345",
        "sk-1234567890",
        "SK-12345678901234567890",
        "changeme",
        "sk-changemechangeme",
        "Password",
        "your_master_key",
        "abcdefghijklmno",
        "sk-aaaaaaaaaaaaaaaaaaaa",
    ],
)
def test_weak(key: str) -> None:
    reason = weakness(key)
    assert reason is not None
    assert "\n" not in reason
    assert not key or key not in reason.split()


@pytest.mark.parametrize("key", [KEY, "f3b1c9d07e6a4852", "correct horse battery staple"])
def test_strong(key: str) -> None:
    assert weakness(key) is None
