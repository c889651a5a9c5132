"""The look-up of a key in Redis, which a request waits for: one command, without a coroutine or a timer of its own."""

from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from txredisapi import RedisError

from vllmproxy.deadlines import Deadlines
from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.calls import is_late
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.redis_schema import key_name
from vllmproxy.store.rows import load_row, name_bytes

#: Seconds that a deadline may pass unseen.
_SLACK: Final = 0.005


class Lookups:
    """Reads keys over a connection.

    :param link: whoever made it opens and closes it.
    :param timeout: seconds that one may take.
    :param name: what Redis is called in messages.
    """

    def __init__(self, link: Link, clock: IReactorTime, timeout: float, name: str) -> None:
        self._link = link
        self._clock = clock
        self._timeout = timeout
        self._name = name
        self._running: Deadlines[_Lookup] = Deadlines(clock, timeout, self._late, slack=_SLACK)

    def get(self, token: str) -> Deferred[VirtualKey | None]:
        """Return the key, ``None`` where there is none. Fails with :class:`StoreUnavailable`. One that is cancelled or
        late leaves its place in the queue of replies."""
        lookup = _Lookup(self, token, self._clock.seconds())
        self._running.set(lookup)
        wire = self._link.ready
        if wire is not None:
            lookup.send(wire)
        else:
            self._link.get().addCallbacks(lookup.send, lookup.not_sent)
        return lookup.result

    def end(self) -> None:
        """Fail every one under way: the store closes."""
        for lookup in list(self._running):
            lookup.fail(StoreUnavailable("the store was closed"))

    def ended(self, lookup: "_Lookup") -> None:
        """It has its answer, or nobody waits for it any more."""
        self._running.clear(lookup)

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

    def _late(self, lookup: "_Lookup") -> None:
        if not lookup.forgiven and is_late(self._clock, lookup.started + self._timeout):
            lookup.forgiven = True
            self._running.set(lookup)
            return
        self._link.late(lookup.wire, lookup.started)
        lookup.fail(StoreUnavailable(f"the store did not answer within {self._timeout:g} s"))


class _Lookup:
    """One look-up on its way to its answer.

    :ivar wire: the connection that it was sent over.
    :ivar forgiven: this process came too late to its deadline to tell, and it was given another one.
    """

    __slots__ = ("_lookups", "_token", "forgiven", "result", "started", "wire")

    def __init__(self, lookups: Lookups, token: str, started: float) -> None:
        self._lookups = lookups
        self._token = token
        self.started = started
        self.wire: Wire | None = None
        self.forgiven = False
        self.result: Deferred[VirtualKey | None] = Deferred(self._cancelled)

    def send(self, wire: Wire) -> None:
        if not self.result.called:
            self.wire = wire
            wire.ask((b"HGET", key_name(name_bytes(self._token)), b"row"), self._answered)

    def not_sent(self, reason: Failure) -> None:
        if not self.result.called:
            self._lookups.ended(self)
            self.result.errback(reason)

    def fail(self, error: StoreUnavailable) -> None:
        self._lookups.ended(self)
        self.result.errback(Failure(error))

    def _answered(self, reply: Any) -> None:
        if not self.result.called:
            self._lookups.ended(self)
            self.result.callback(self._lookups.answer(reply))

    def _cancelled(self, _: "Deferred[VirtualKey | None]") -> None:
        self._lookups.ended(self)
