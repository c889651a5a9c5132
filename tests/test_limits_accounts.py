"""Balances in memory: which of them are kept."""

import pytest

from vllmproxy.limits import accounts
from vllmproxy.limits.accounts import Accounts
from vllmproxy.limits.values import Rule
from vllmproxy.usage.sums import Account

RULE = Rule("budget", "", 100, 0)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Accounts:
    """Three balances, of which one is idle at most."""
    monkeypatch.setattr(accounts, "_MOST_IDLE", 3)
    made = Accounts()
    for token in "abc":
        made.open(token, Account(0, 7, 0))
    return made


def test_the_one_that_was_not_used_for_longest_goes(kept: Accounts) -> None:
    assert kept.left("a", RULE) == 93
    kept.open("d", Account())
    assert [token for token in "abcd" if token in kept] == ["a", "c", "d"]


def test_where_each_of_them_holds_something_another_is_kept_all_the_same(kept: Accounts) -> None:
    """Its first request would ask for it again and again."""
    for token in "abc":
        kept.hold(token, RULE, 1)
    kept.open("d", Account(0, 90, 0))
    assert kept.left("d", RULE) == 10
    assert [token for token in "abcd" if token in kept] == ["a", "b", "c", "d"]
    kept.settle("b", RULE, -1)
    kept.hold("d", RULE, 1)
    kept.open("e", Account())
    assert [token for token in "abcde" if token in kept] == ["a", "c", "d", "e"]


def test_what_is_known_is_not_begun_again(kept: Accounts) -> None:
    kept.open("a", Account(0, 50, 0))
    assert [kept.left(token, RULE) for token in "abc"] == [93] * 3
