"""What every store does in the same way, in terms of the few things that each does in its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from attrs import frozen
from twisted.internet.defer import Deferred

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.interface import AliasTaken, AuditEntry, Decide, Writes
from vllmproxy.store.listing import KeyPage, KeyQuery, Selection
from vllmproxy.usage.sums import Spent

#: Seconds that a listing may take which has to look at every key.
LIST_SECONDS: Final = 10.0


class Changes(Protocol):
    """The part of a :class:`~vllmproxy.store.interface.Store` that rests on ``change_keys``, and who hears of those."""

    _watchers: list[Callable[[str | None], None]]

    def get_key(self, token: str) -> Deferred[VirtualKey | None]: ...

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]: ...

    async def change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes: ...

    async def _list(self, query: KeyQuery) -> KeyPage:
        """List where only looking at every key, or an index by time, can tell which are meant."""
        ...

    def watch_keys(self, changed: Callable[[str | None], None]) -> None:
        self._watchers.append(changed)

    def _tell(self, tokens: Iterable[str]) -> None:
        """These keys have changed."""
        for token in tokens:
            for changed in self._watchers:
                changed(token)

    async def add_audit(self, entry: AuditEntry) -> None:
        await self.change_keys([], lambda _: Writes(audit=(entry,)))

    async def list_keys(self, query: KeyQuery) -> KeyPage:
        token = query.token
        if token is None and query.key_alias is not None:
            token = (await self.find_aliases([query.key_alias])).get(query.key_alias)
            if token is None:
                return KeyPage((), 0)
        if token is None:
            return await self._list(query)
        key = await self.get_key(token)
        selection = Selection(query)
        selection.add([] if key is None else [key])
        return KeyPage((key,) if key is not None and selection.page() else (), len(selection))


@frozen
class AliasChanges:
    """What a change does to the index of aliases.

    :ivar freed: aliases that the keys it touches have now.
    :ivar given: alias → token that they have afterwards.
    :ivar taken: those of ``given`` that nobody may have now.
    """

    freed: tuple[str, ...]
    given: Mapping[str, str]
    taken: tuple[str, ...]


def alias_changes(found: Mapping[str, VirtualKey], writes: Writes) -> AliasChanges:
    """Return what ``writes`` does to aliases, where ``found`` are the keys as they are.

    :raises AliasTaken: two of its keys would have the same alias.
    """
    touched = (found[token].key_alias for token in dict.fromkeys(writes.tokens) if token in found)
    freed = tuple(alias for alias in touched if alias is not None)
    given = {key.key_alias: key.token for key in writes.put if key.key_alias is not None}
    if len(given) < sum(key.key_alias is not None for key in writes.put):
        raise AliasTaken
    return AliasChanges(freed, given, tuple(alias for alias in given if alias not in freed))


@frozen
class AccountChanges:
    """What a change does to accounts.

    :ivar ended: tokens whose accounts go once it is known what is inherited: of keys that are removed, and of new ones,
        which begin with nothing or with what they inherit or are said to have spent.
    :ivar inherited: token → token of the key whose account, as it was before, it takes over.
    :ivar spent: token → what is said of its account, after all that.
    """

    ended: tuple[str, ...]
    inherited: Mapping[str, str]
    spent: Mapping[str, Spent]


def account_changes(found: Mapping[str, VirtualKey], writes: Writes) -> AccountChanges:
    """Return what ``writes`` does to accounts, where ``found`` are the keys as they are."""
    new = (key.token for key in writes.put if key.token not in found)
    return AccountChanges(tuple(dict.fromkeys((*writes.remove, *new, *writes.inherits))), writes.inherits, writes.spent)
