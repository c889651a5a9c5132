"""The store that forgets: keys in this process, gone with it."""

from collections.abc import Sequence

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.interface import Limiter
from vllmproxy.store.changes import Changes, account_changes, alias_changes
from vllmproxy.store.interface import AliasTaken, Decide, StoredEntry, StoreUnavailable, Writes
from vllmproxy.store.limits_memory import MemoryLimiters
from vllmproxy.store.listing import KeyPage, KeyQuery, Selection
from vllmproxy.store.rows import dump_entry, dump_row, load_entry, load_row
from vllmproxy.store.usage_memory import MemoryUsage
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import Tally
from vllmproxy.usage.sums import Account, UsageQuery, UsageSum


class MemoryStore(Changes):
    """The :class:`~vllmproxy.store.interface.Store` in memory. Nothing in it waits: all is atomic."""

    def __init__(self) -> None:
        self._open = False
        #: Rows, not keys: what a caller does to the ``metadata`` it gave or got changes nothing here.
        self._rows: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._audit: list[str] = []
        self._usage = MemoryUsage()
        self._limiters = MemoryLimiters(self.read_account)
        self._watchers = []

    async def open(self) -> None:
        self._open = True

    async def close(self) -> None:
        self._open = False
        self._rows.clear()
        self._aliases.clear()
        self._audit.clear()
        self._usage.clear()

    def limiter(self, clock: IReactorTime) -> Limiter:
        return self._limiters.make(clock)

    async def ping(self) -> None:
        self._check_open()

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        return maybeDeferred(self._get_key, token)

    def _get_key(self, token: str) -> VirtualKey | None:
        self._check_open()
        row = self._rows.get(token)
        return None if row is None else load_row(row)

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        self._check_open()
        return {alias: self._aliases[alias] for alias in aliases if alias in self._aliases}

    async def change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes:
        self._check_open()
        found = {token: load_row(self._rows[token]) for token in tokens if token in self._rows}
        writes = decide(found)
        rows = {key.token: dump_row(key) for key in writes.put}
        entries = [dump_entry(entry) for entry in writes.audit]
        aliases = alias_changes(found, writes)
        if any(alias in self._aliases for alias in aliases.taken):
            raise AliasTaken
        # From here on nothing fails.
        for alias in aliases.freed:
            del self._aliases[alias]
        self._aliases.update(aliases.given)
        for token in writes.remove:
            self._rows.pop(token, None)
        self._rows.update(rows)
        spent = self._usage.change(account_changes(found, writes))
        self._audit += entries
        self._limiters.changed(writes, spent)
        self._tell(writes.tokens)
        return writes

    async def list_audit(self, limit: int, before: str | None = None) -> list[StoredEntry]:
        self._check_open()
        end = len(self._audit) if before is None else min(int(before.partition("-")[0]), len(self._audit))
        return [StoredEntry(str(id), load_entry(self._audit[id])) for id in range(end - 1, max(end - limit, 0) - 1, -1)]

    async def add_usage(
        self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None
    ) -> None:
        self._check_open()
        self._limiters.added(self._usage.add(writer, first, events, tally), events)

    async def forget_writer(self, writer: str) -> None:
        self._check_open()
        self._usage.forget(writer)

    async def read_usage(self, query: UsageQuery) -> list[UsageSum]:
        self._check_open()
        return self._usage.read(query)

    async def read_account(self, token: str) -> Account:
        self._check_open()
        return self._usage.account(token)

    async def _list(self, query: KeyQuery) -> KeyPage:
        self._check_open()
        selection = Selection(query)
        selection.add(map(load_row, self._rows.values()))
        return KeyPage(tuple(load_row(self._rows[token]) for token in selection.page()), len(selection))

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the store is closed")
