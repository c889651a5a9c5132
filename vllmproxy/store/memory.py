"""The store that forgets: keys in this process, gone with it."""

from collections.abc import Sequence

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.interface import AliasTaken, StoreUnavailable, TokenTaken
from vllmproxy.store.rows import dump_row, load_row


class MemoryStore:
    """The :class:`~vllmproxy.store.interface.Store` in memory. Nothing in it waits: all is atomic."""

    def __init__(self) -> None:
        self._open = False
        #: Rows, not keys: what a caller does to the ``metadata`` it gave or got changes nothing here.
        self._rows: dict[str, str] = {}
        self._aliases: dict[str, str] = {}

    async def open(self) -> None:
        self._open = True

    async def close(self) -> None:
        self._open = False
        self._rows.clear()
        self._aliases.clear()

    async def ping(self) -> None:
        self._check_open()

    async def add_key(self, key: VirtualKey) -> None:
        self._check_open()
        if key.token in self._rows:
            raise TokenTaken
        if key.key_alias in self._aliases:
            raise AliasTaken
        self._rows[key.token] = dump_row(key)
        if key.key_alias is not None:
            self._aliases[key.key_alias] = key.token

    async def get_key(self, token: str) -> VirtualKey | None:
        self._check_open()
        row = self._rows.get(token)
        return None if row is None else load_row(row)

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        self._check_open()
        return {alias: self._aliases[alias] for alias in aliases if alias in self._aliases}

    async def delete_keys(self, tokens: Sequence[str]) -> list[str]:
        self._check_open()
        return [token for token in tokens if self._delete(token)]

    def _delete(self, token: str) -> bool:
        row = self._rows.pop(token, None)
        if row is None:
            return False
        alias = load_row(row).key_alias
        if alias is not None:
            del self._aliases[alias]
        return True

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the store is closed")
