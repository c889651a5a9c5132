"""Sums and accounts in SQLite: each function is the work of one transaction."""

from collections.abc import Mapping, Sequence
from typing import Final

from twisted.enterprise.adbapi import Transaction

from vllmproxy.store.changes import AccountChanges
from vllmproxy.store.rows import name_bytes, name_text
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import (
    MOST_END_USERS,
    MOST_GROUPS,
    MOST_MODELS,
    OTHER,
    Tally,
    TooManySums,
    batch_of,
    days_of,
    oldest_kept,
    sum_of,
    unseen,
)
from vllmproxy.usage.sums import NO_ACCOUNT, NUMBERS, Account, UsageQuery, UsageSum

_KEY: Final = ("day", "key", "model", "end_user")
_ADD: Final = (
    f"INSERT INTO usage ({', '.join(_KEY + NUMBERS)}) VALUES ({', '.join('?' for _ in _KEY + NUMBERS)}) "
    f"ON CONFLICT ({', '.join(_KEY)}) DO UPDATE "
    f"SET {', '.join(f'{name} = {name} + excluded.{name}' for name in NUMBERS)}"
)
_TABLES: Final = ("usage", "usage_names")


def add(
    transaction: Transaction, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None
) -> dict[str, Account]:
    """Add those of ``events`` that are new, and return the accounts of all their keys.

    Also of those that were added before: who sends them again was not told what came of it.
    """
    new = unseen(first, events, last(transaction, writer))
    batch = batch_of(new, tally)
    for (day, key), rows in batch.sums.items():
        keyday = day, name_bytes(key)
        for (model, end_user), numbers in rows.items():
            names = (
                _name(transaction, keyday, "model", model, MOST_MODELS),
                _name(transaction, keyday, "end_user", end_user, MOST_END_USERS),
            )
            transaction.execute(_ADD, (*keyday, *names, *numbers))
    for token, charge in batch.charges.items():
        _set_account(transaction, token, charge.applied(account(transaction, token)))
    if new:
        place = first + len(events) - 1
        transaction.execute("INSERT OR REPLACE INTO usage_writers VALUES (?, ?)", (name_bytes(writer), place))
    return {event.key: account(transaction, event.key) for event in events if event.is_of_virtual_key}


def last(transaction: Transaction, writer: str) -> int:
    """Return the number of the last event that was added of ``writer``."""
    transaction.execute("SELECT last FROM usage_writers WHERE writer = ?", (name_bytes(writer),))
    found = transaction.fetchone()
    return 0 if found is None else int(found[0])


def forget(transaction: Transaction, writer: str) -> None:
    """Forget ``writer``."""
    transaction.execute("DELETE FROM usage_writers WHERE writer = ?", (name_bytes(writer),))


def read(transaction: Transaction, query: UsageQuery) -> list[UsageSum]:
    """Return the sums that ``query`` asks for."""
    days = days_of(query)
    # Day by day, for that is how the rows lie: so the rows of one key are found without reading those of all.
    conditions = [f"day IN ({', '.join('?' * len(days))})"]
    wanted: list[bytes] = []
    for column, name in (("key", query.key), ("model", query.model), ("end_user", query.end_user)):
        if name is not None:
            conditions.append(f"{column} = ?")
            wanted.append(name_bytes(name))
    groups = ", ".join(query.group_by)
    columns = ", ".join([*query.group_by, *(f"sum({name})" for name in NUMBERS)])
    order = f" GROUP BY {groups} ORDER BY {groups}" if groups else ""
    select = f"SELECT {columns} FROM usage WHERE {' AND '.join(conditions)}{order} LIMIT ?"
    transaction.execute(select, (*days, *wanted, MOST_GROUPS + 1))
    count = len(query.group_by)
    # Without groups there is a row even where there is nothing to sum up.
    rows = [row for row in transaction.fetchall() if row[count] is not None]
    if len(rows) > MOST_GROUPS:
        raise TooManySums
    return [sum_of(tuple(map(_text, row[:count])), row[count:]) for row in rows]


def account(transaction: Transaction, token: str) -> Account:
    """Return what the key with that id has spent."""
    transaction.execute("SELECT period, spend, tokens FROM accounts WHERE token = ?", (name_bytes(token),))
    found = transaction.fetchone()
    return NO_ACCOUNT if found is None else Account(*found)


def change(transaction: Transaction, changes: AccountChanges) -> dict[str, Account]:
    """Let accounts go, pass others on and set some, with a change of keys. Return those that were set."""
    inherited: Mapping[str, Account] = {heir: account(transaction, token) for heir, token in changes.inherited.items()}
    for token in changes.ended:
        transaction.execute("DELETE FROM accounts WHERE token = ?", (name_bytes(token),))
    for heir, passed in inherited.items():
        _set_account(transaction, heir, passed)
    spent = {token: said.applied(account(transaction, token)) for token, said in changes.spent.items()}
    for token, each in spent.items():
        _set_account(transaction, token, each)
    return spent


def remove_old(transaction: Transaction, today: str) -> None:
    """Remove the sums that are kept no longer on the day ``today``, and what keys used that were deleted meanwhile."""
    for table in _TABLES:
        transaction.execute(f"DELETE FROM {table} WHERE day < ?", (oldest_kept(today),))
    transaction.execute("DELETE FROM accounts WHERE token NOT IN (SELECT token FROM keys)")


def _set_account(transaction: Transaction, token: str, account: Account) -> None:
    values = (name_bytes(token), account.period, account.spend, account.tokens)
    transaction.execute("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?)", values)


def _name(transaction: Transaction, keyday: tuple[str, bytes], kind: str, name: str, most: int) -> bytes:
    """Return the name that ``name`` is summed up under."""
    row = (*keyday, kind, name_bytes(name))
    of_kind = "FROM usage_names WHERE day = ? AND key = ? AND kind = ?"
    if not name or transaction.execute(f"SELECT 1 {of_kind} AND name = ?", row).fetchone():
        return row[-1]
    (count,) = transaction.execute(f"SELECT count(*) {of_kind}", row[:-1]).fetchone()
    if count >= most:
        return name_bytes(OTHER)
    transaction.execute("INSERT INTO usage_names VALUES (?, ?, ?, ?)", row)
    return row[-1]


def _text(name: str | bytes) -> str:
    return name_text(name) if isinstance(name, bytes) else name
