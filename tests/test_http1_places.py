"""Places and the line before them, against the plain way to have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.http1.places import Places, client_named

STEPS = st.lists(st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 12)), max_size=60)
CLIENTS = ["", "a", "b"]


@given(STEPS, st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
def test_nothing_is_lost_whatever_the_order(
    steps: list[tuple[str, int]], most: int, line: int, per_client: int
) -> None:
    places: Places[int] = Places(most, line=line, per_client=per_client)
    placed: list[int] = []
    waiting: list[int] = []
    for what, item in steps:
        client = CLIENTS[item % 3]
        if what == "leave":
            next_one = None
            if item in placed:
                placed.remove(item)
                if waiting:
                    next_one = waiting.pop(0)
                    placed.append(next_one)
            elif item in waiting:
                waiting.remove(item)
            assert places.leave(item) == next_one
        elif item not in placed and item not in waiting:
            entry = places.enter(item, client)
            of_client = sum(CLIENTS[each % 3] == client for each in placed + waiting)
            if client and per_client and of_client >= per_client:
                assert entry == "client_full"
            elif not most or len(placed) < most:
                assert entry == "placed"
                placed.append(item)
            elif len(waiting) < line:
                assert entry == "waiting"
                waiting.append(item)
            else:
                assert entry == ("line_full" if line else "no_place")
        assert (places.taken, places.waiting) == (len(placed), len(waiting))
    for item in range(13):
        places.leave(item)
    for item in range(13):
        places.leave(item)
    assert (places.taken, places.waiting) == (0, 0)
    assert not places._of_client


def test_after_the_end_nobody_is_called() -> None:
    places: Places[str] = Places(1, line=1)
    assert [places.enter("a", ""), places.enter("b", "")] == ["placed", "waiting"]
    places.close()
    assert places.leave("a") is None
    assert places.waiting == 1


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::1", "::"),
        ("", ""),
        ("/run/x.sock", ""),
    ],
)
def test_how_an_address_is_counted(address: str, client: str) -> None:
    assert client_named(address) == client
