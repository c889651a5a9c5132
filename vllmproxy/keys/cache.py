"""What is known of keys for a short while, in bounded memory."""

from collections import OrderedDict
from typing import Final

from attrs import define
from twisted.internet.interfaces import IReactorTime

from vllmproxy.keys.key import VirtualKey

#: How many keys that do not exist are remembered; a stream of made-up keys turns over these places only.
MAX_UNKNOWN: Final = 10_000
UNKNOWN_SECONDS: Final = 1.0


@define  # not frozen, which takes three times as long to make: there is one for each look-up
class _Known:
    """A key as the store gave it.

    :ivar since: when it did.
    :ivar doubts: how many times :meth:`KeyCache.doubt` had been called then.
    """

    key: VirtualKey
    since: float
    doubts: int


class KeyCache:
    """Token (sha256 hex) → key, least recently used out first; and, apart from it, tokens known not to exist.

    :param max_entries: how many keys are kept.
    :param ttl: seconds a key is believed, which is how late another process's revocation may take effect. That there is
        no such key is believed as long, but for :data:`UNKNOWN_SECONDS` at most: how late its new key may begin.
    :param max_stale: seconds that :meth:`get_stale` goes on giving a key; 0: it gives none.
    """

    def __init__(
        self,
        clock: IReactorTime,
        max_entries: int = 100_000,
        ttl: float = 1.0,
        max_unknown: int = MAX_UNKNOWN,
        *,
        max_stale: float = 0.0,
    ) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self.ttl = ttl
        self._max_unknown = max_unknown
        self.max_stale = max_stale
        self._doubts = 0
        self._keys: OrderedDict[str, _Known] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()

    def get(self, token: str) -> VirtualKey | None:
        """Return the key if it is held and fresh; ``None`` says nothing about whether it exists."""
        known = self._keys.get(token)
        if known is None or known.doubts != self._doubts or self._clock.seconds() - known.since >= self.ttl:
            self._held(token)  # or no longer
            return None
        self._keys.move_to_end(token)
        return known.key

    def get_stale(self, token: str) -> VirtualKey | None:
        """Return the key if the store gave it within ``max_stale`` seconds: for when the store cannot be asked."""
        known = self._held(token)
        return known.key if known is not None and self._age(known) < self.max_stale else None

    def is_unknown(self, token: str) -> bool:
        """Tell whether the store has lately said that there is no such key."""
        until = self._unknown.get(token)
        if until is None:
            return False
        if self._clock.seconds() >= until:
            del self._unknown[token]
            return False
        return True

    def put(self, token: str, key: VirtualKey | None) -> None:
        """Remember the store's answer for ``token``; ``None``: there is no such key."""
        self.forget(token)
        now = self._clock.seconds()
        if key is None:
            self._unknown[token] = now + min(self.ttl, UNKNOWN_SECONDS)
            if len(self._unknown) > self._max_unknown:
                self._unknown.popitem(last=False)
        else:
            self._keep(token, _Known(key, now, self._doubts))

    def put_doubted(self, token: str, key: VirtualKey | None) -> None:
        """Remember an answer under way to which :meth:`doubt` was called: stale at once, and less than a later one."""
        known = self._keys.get(token)
        if self.is_unknown(token) or (known is not None and known.doubts == self._doubts):
            return
        self.forget(token)
        if key is not None:
            self._keep(token, _Known(key, self._clock.seconds(), self._doubts - 1))

    def forget(self, token: str) -> None:
        """Drop whatever is held for ``token``."""
        self._keys.pop(token, None)
        self._unknown.pop(token, None)

    def doubt(self) -> None:
        """Take nothing for fresh any more; what is held now goes on being stale."""
        self._doubts += 1
        self._unknown.clear()

    def _keep(self, token: str, known: _Known) -> None:
        self._keys[token] = known
        if len(self._keys) > self._max_entries:
            self._keys.popitem(last=False)

    def _held(self, token: str) -> _Known | None:
        """Return what is held of a key, unless it is good for nothing any more."""
        known = self._keys.get(token)
        if known is None:
            return None
        if self._age(known) >= max(self.ttl, self.max_stale):
            del self._keys[token]
            return None
        self._keys.move_to_end(token)
        return known

    def _age(self, known: _Known) -> float:
        return self._clock.seconds() - known.since

    def __len__(self) -> int:
        """Return how many entries of both kinds are held."""
        return len(self._keys) + len(self._unknown)
