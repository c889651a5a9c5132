"""What the proxy asks of the limits; memory and Redis are its twins."""

from collections.abc import Sequence
from typing import Protocol

from twisted.internet.defer import Deferred

from vllmproxy.limits.values import Ask, Denied, Granted


class Limiter(Protocol):
    """Counts what the requests of virtual keys take. ``docs/limits.rst`` says what each twin guarantees.

    A method that returns a Deferred ends within its own deadline, and may fail with
    :class:`~vllmproxy.store.interface.StoreUnavailable`. Then nothing was taken, or it was given back, or, if Redis
    cannot be told so, it leaves by itself: amounts when the window has passed, leases when theirs has, and what is held
    of a budget after the next day (UTC), or when its period is over.
    """

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        """Take from all of the ask's limits, or from none.

        :raises DuplicateRequest: the request id was reserved before, settled or not.
        """

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        """Say what the request did cost, and end its lease. Only the first time for a request id counts, and only
        while the reservation is remembered. Where a store has to be told, that is tried for as long as it matters.

        What was held of a budget stays held until the store adds the request's usage event to the account.

        :param costs: for each rule of the ask what was really used, ``None`` for what was taken; those left out are
            ``None``. Used tokens count where they were taken: when those have left the window, so have these.
            What is not between 0 and ``MAX_AMOUNT`` is taken for the nearer of them.
        """

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        """Let the leases of these requests last as long again, and return the ids that have none any more."""

    async def finish(self) -> None:
        """Return when all is told that was settled, as far as it can be."""
