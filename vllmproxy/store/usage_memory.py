"""Sums and accounts in memory."""

from collections.abc import Mapping, Sequence

from attrs import Factory, define

from vllmproxy.store.changes import AccountChanges
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import (
    MOST_END_USERS,
    MOST_MODELS,
    NOTHING,
    OTHER,
    Numbers,
    Summing,
    Tally,
    added,
    batch_of,
    days_of,
    oldest_kept,
    unseen,
)
from vllmproxy.usage.sums import NO_ACCOUNT, Account, UsageQuery, UsageSum


@define
class _KeyDay:
    """One key's sums of one day, and the names that have sums of their own."""

    models: set[str] = Factory(set)
    end_users: set[str] = Factory(set)
    sums: dict[tuple[str, str], Numbers] = Factory(dict)

    def add(self, model: str, end_user: str, numbers: Numbers) -> None:
        row = (_name(model, self.models, MOST_MODELS), _name(end_user, self.end_users, MOST_END_USERS))
        self.sums[row] = added(self.sums.get(row, NOTHING), numbers)


def _name(name: str, known: set[str], most: int) -> str:
    if name and len(known) < most:
        known.add(name)
    return name if not name or name in known else OTHER


class MemoryUsage:
    """What :class:`~vllmproxy.store.memory.MemoryStore` keeps of usage; the methods are those of a store."""

    def __init__(self) -> None:
        self._days: dict[str, dict[str, _KeyDay]] = {}
        self._writers: dict[str, int] = {}
        self._accounts: dict[str, Account] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._days.clear()
        self._writers.clear()
        self._accounts.clear()

    def add(self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None) -> Mapping[str, Account]:
        """Add those of ``events`` that are new, and return the accounts of all their keys."""
        new = unseen(first, events, self.last(writer))
        batch = batch_of(new, tally)
        # From here on nothing fails.
        for (day, key), rows in batch.sums.items():
            if day not in self._days:
                self._begin(day)
            keyday = self._days[day].setdefault(key, _KeyDay())
            for (model, end_user), numbers in rows.items():
                keyday.add(model, end_user, numbers)
        for token, charge in batch.charges.items():
            self._accounts[token] = charge.applied(self.account(token))
        if new:
            self._writers[writer] = first + len(events) - 1
        return {event.key: self.account(event.key) for event in events if event.is_of_virtual_key}

    def last(self, writer: str) -> int:
        return self._writers.get(writer, 0)

    def forget(self, writer: str) -> None:
        self._writers.pop(writer, None)

    def read(self, query: UsageQuery) -> list[UsageSum]:
        summing = Summing(query)
        for day in days_of(query):
            keys = self._days.get(day, {})
            for key in keys if query.key is None else keys.keys() & {query.key}:
                for (model, end_user), numbers in keys[key].sums.items():
                    summing.add(day, key, model, end_user, numbers)
        return summing.result()

    def account(self, token: str) -> Account:
        return self._accounts.get(token, NO_ACCOUNT)

    def change(self, changes: AccountChanges) -> Mapping[str, Account]:
        """Let accounts go, pass others on and set some, with a change of keys. Return those that were set."""
        inherited = {heir: self.account(token) for heir, token in changes.inherited.items()}
        for token in changes.ended:
            self._accounts.pop(token, None)
        self._accounts |= inherited
        spent = {token: said.applied(self.account(token)) for token, said in changes.spent.items()}
        self._accounts |= spent
        return spent

    def _begin(self, day: str) -> None:
        self._days[day] = {}
        kept = oldest_kept(max(self._days))
        for old in [each for each in self._days if each < kept and each != day]:
            del self._days[old]
