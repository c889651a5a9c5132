"""How many connections the limit of open files allows."""

import re
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.openfiles import capacity, raise_open_files


@pytest.mark.parametrize(
    ("open_files", "wanted", "connections", "says"),
    [
        (20_000, None, 9872, ""),
        (524_288, None, 10_000, ""),
        (1024, None, 384, "LimitNOFILE"),
        (100, None, 1, "LimitNOFILE"),
        (20_000, 9000, 9000, ""),
        (20_000, 9872, 9872, ""),
        (20_000, 9873, 9872, "--max-connections: 9873 .* 20000 .* 20002 "),
        (524_288, 50_000, 50_000, ""),
        (resource.RLIM_INFINITY, None, 10_000, ""),
        (resource.RLIM_INFINITY, 70_000, 70_000, ""),
        (1024, 5, 5, ""),
    ],
)
def test_what_fits(open_files: int, wanted: int | None, connections: int, says: str) -> None:
    found = capacity(open_files, wanted)
    assert found.connections == connections
    assert bool(found.warning) is bool(says)
    assert re.search(says, found.warning or "")


@given(st.integers(0, 10**6), st.none() | st.integers(1, 10**6))
def test_never_none_and_never_more_than_fits(open_files: int, wanted: int | None) -> None:
    found = capacity(open_files, wanted)
    assert 1 <= found.connections <= max(1, open_files // 2)
    assert found.connections <= (wanted or 10_000)


def test_the_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
