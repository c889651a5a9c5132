"""The look-up of a key in Redis, which a request waits for: one command."""

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from txredisapi import RedisError

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.asking import Asked, Asking
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.redis_schema import key_name
from vllmproxy.store.rows import load_row, name_bytes


class _Lookup(Asked["Lookups", str, VirtualKey | None]):
    """One look-up on its way to its answer: of a token."""

    __slots__ = ()

    def send(self, wire: Wire) -> None:
        if not self.result.called:
            self.wire = wire
            wire.ask((b"HGET", key_name(name_bytes(self.what)), b"row"), self._answered)

    def _answered(self, reply: Any) -> None:
        if not self.result.called:
            self.asking.ended(self)
            self.result.callback(self.asking.answer(reply))


class Lookups(Asking):
    """Reads keys over a connection.

    :param name: what Redis is called in messages.
    """

    def __init__(self, link: Link, clock: IReactorTime, timeout: float, name: str) -> None:
        super().__init__(link, clock, timeout)
        self._name = name

    def get(self, token: str) -> Deferred[VirtualKey | None]:
        """Return the key, ``None`` where there is none. Fails with :class:`StoreUnavailable`."""
        lookup = _Lookup(self, token)
        self.begin(lookup)
        return lookup.result

    def load(self, row: bytes) -> VirtualKey:
        """Return the key that is kept as ``row``. Raises :class:`StoreUnavailable`."""
        try:
            return load_row(row)
        except ValueError as error:
            raise StoreUnavailable(f"{self._name} holds something else than a key's row: {error}") from error

    def answer(self, reply: Any) -> VirtualKey | Failure | None:
        """Return what a reply of Redis means."""
        if reply is None:
            return None
        try:
            if isinstance(reply, RedisError):
                raise StoreUnavailable(f"{self._name}: {reply}") from reply
            return self.load(reply)
        except Exception:  # nothing is awaited here; whatever is wrong with it, who waits must be told
            return Failure()
