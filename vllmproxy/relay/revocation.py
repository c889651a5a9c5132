"""What a key has under way when it is deleted or blocked."""

from functools import partial
from typing import Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.deadlines import Deadlines
from vllmproxy.errors import AuthError, ExpiredKey, StoreDown
from vllmproxy.keys.gate import Gate
from vllmproxy.relay.relay import Relay

_log = Logger(namespace=__name__)

#: Seconds between two tries to find out what has become of a key, while the store is away.
AGAIN: Final = 1.0


class Revocation:
    """Told of every key that has changed, asks whether it is still good, and ends its requests if not.

    :param cuts: those, too, that have been forwarded (``--cut-revoked``).
    """

    def __init__(self, gate: Gate, relay: Relay, *, cuts: bool) -> None:
        self._gate = gate
        self._relay = relay
        self._cuts = cuts
        #: Keys that nobody could tell of.
        self._unsure: Deadlines[str] = Deadlines(relay.clock, AGAIN, self.changed)

    def changed(self, token: str | None) -> None:
        """See :meth:`vllmproxy.keys.gate.Gate.watch`."""
        running = self._relay.running()
        for key in running if token is None else {token}.intersection(running):
            if key != "master":
                self._check(key)

    def close(self) -> None:
        """Ask no more."""
        self._unsure.close()

    def _check(self, token: str) -> None:
        try:
            caller = self._gate.admit(token, stale=False)
        except ExpiredKey:  # nobody takes that away: what began in time may end
            return
        except AuthError:  # it is not: blocked, or known to be gone
            self._relay.revoke(token, forwarded=self._cuts)
            return
        if isinstance(caller, Deferred):
            caller.addErrback(partial(self._not_admitted, token))

    def _not_admitted(self, token: str, reason: Failure) -> None:
        if reason.check(ExpiredKey):
            return
        if reason.check(AuthError):
            self._relay.revoke(token, forwarded=self._cuts)
        elif reason.check(StoreDown):  # while the store is away, nobody knows
            self._unsure.set(token)
        else:
            _log.failure("Looking a changed key up failed", reason)
