import pytest

from vllmproxy.keys.credentials import CREDENTIAL_HEADERS, Credential, read_credential
from vllmproxy.keys.key import hash_key


def present(secret: bytes) -> Credential:
    return Credential("present", hash_key(secret))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Credential("none")),
        ({b"cookie": [b"sk-a"]}, Credential("none")),
        ({b"authorization": []}, Credential("none")),
        ({b"authorization": [b"  "]}, Credential("none")),
        ({b"authorization": [b""], b"x-api-key": [b"sk-a"]}, present(b"sk-a")),
        ({b"authorization": [b"Bearer sk-a"]}, present(b"sk-a")),
        ({b"authorization": [b" bEARER   sk-a\t"]}, present(b"sk-a")),
        ({b"authorization": [b"sk-a"]}, Credential("malformed")),
        ({b"authorization": [b"Bearer"]}, Credential("malformed")),
        ({b"authorization": [b"Bearer "]}, Credential("malformed")),
        ({b"authorization": [b"Bearersk-a"]}, Credential("malformed")),
        ({b"authorization": [b"Basic c2s="]}, Credential("malformed")),
        ({b"authorization": [b"Bearer sk-a, Bearer sk-b"]}, Credential("malformed")),
        ({b"x-api-key": [b"sk-a"]}, present(b"sk-a")),
        ({b"x-api-key": [b"Bearer sk-a"]}, present(b"sk-a")),
        ({b"api-key": [b"sk-a"]}, present(b"sk-a")),
        ({b"x-litellm-api-key": [b"bearer sk-a"]}, present(b"sk-a")),
        ({b"x-litellm-api-key": [b"two words"]}, Credential("malformed")),
        ({b"authorization": [b"Bearer sk-a", b"Bearer sk-a"]}, present(b"sk-a")),
        ({b"authorization": [b"Bearer sk-a", b"Bearer sk-b"]}, Credential("malformed")),
        ({b"authorization": [b"", b"Bearer sk-b"]}, Credential("malformed")),
        # The first one that is there counts, whatever comes after it.
        ({b"authorization": [b"Basic x"], b"x-api-key": [b"sk-a"]}, Credential("malformed")),
        ({b"x-api-key": [b"sk-d"], b"api-key": [b"sk-c"]}, present(b"sk-c")),
    ],
)
def test_table(fields: dict[bytes, list[bytes]], expected: Credential) -> None:
    assert read_credential(fields) == expected


def test_order_is_litellms() -> None:
    fields = {name: [b"Bearer " + name] for name in reversed(CREDENTIAL_HEADERS)}
    for name in CREDENTIAL_HEADERS:
        assert read_credential(fields).token == hash_key(name)
        del fields[name]
    assert read_credential(fields).state == "none"


def test_repr_hides_the_secret() -> None:
    assert "canary" not in repr(present(b"sk-canary"))
