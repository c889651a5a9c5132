"""What a key has under way when it is deleted or blocked."""

from functools import partial

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import AuthError, ExpiredKey, StoreDown
from vllmproxy.keys.gate import Gate
from vllmproxy.relay.relay import Relay

_log = Logger()


class Revocation:
    """Told of every key that has changed, asks whether it is still good, and ends its requests if not.

    :param cuts: those, too, that have been forwarded (``--cut-revoked``).
    """

    def __init__(self, gate: Gate, relay: Relay, *, cuts: bool) -> None:
        self._gate = gate
        self._relay = relay
        self._cuts = cuts

    def changed(self, token: str | None) -> None:
        """See :meth:`vllmproxy.keys.gate.Gate.watch`."""
        running = self._relay.running()
        for key in running if token is None else {token}.intersection(running):
            if key != "master":
                self._check(key)

    def _check(self, token: str) -> None:
        try:
            caller = self._gate.admit(token)
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
        elif reason.check(StoreDown) is None:  # while the store is away, nobody knows
            _log.failure("Looking a changed key up failed", reason)
