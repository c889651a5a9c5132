import mmap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.relay.holding import HeldBody

BLOCK = bytes(range(256)) * 1024  # 256 KiB
LARGE = BLOCK * 12


def held(data: bytes, length: int | None, size: int = len(BLOCK)) -> HeldBody:
    body = HeldBody(data[:size], length)
    for at in range(size, len(data), size):
        body.add(data[at : at + size])
    return body


@given(st.lists(st.binary(max_size=20), min_size=1), st.booleans())
def test_a_short_one_is_what_came(pieces: list[bytes], known: bool) -> None:
    whole = b"".join(pieces)
    body = HeldBody(pieces[0], len(whole) if known else None)
    for piece in pieces[1:]:
        body.add(piece)
    assert body.whole == whole


@pytest.mark.parametrize("size", [len(BLOCK), 100_000, len(LARGE) - 1])
def test_a_large_one_has_memory_of_its_own(size: int) -> None:
    whole = held(LARGE, len(LARGE), size).whole
    assert isinstance(whole, mmap.mmap)
    assert whole[:] == LARGE


def test_one_of_unknown_length_is_what_came() -> None:
    assert held(LARGE, None).whole == LARGE


def test_none_is_made_for_what_does_not_come() -> None:
    assert isinstance(held(BLOCK * 8, len(LARGE)).whole, bytes)


@pytest.mark.parametrize("what", ["mmap", "madvise"])
def test_where_the_kernel_refuses(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def __new__(cls, *args: Any, **named: Any) -> "Refusing":
            if what == "mmap":
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, *args, **named)

        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert held(LARGE, len(LARGE)).whole[:] == LARGE
