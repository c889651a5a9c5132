"""A journal, and how far the store has come with it."""

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from attrs import Factory, define, frozen
from twisted.logger import Logger

from vllmproxy.soon import Soon
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.journal import Ended, Journal, Numbered
from vllmproxy.usage.ledger import Tally

_log = Logger(namespace=__name__)

#: Events in one call to the store, about, and events kept in memory for it; more are read from the file again.
_BATCH: Final = 500
_MOST_PENDING: Final = 10_000
#: Bytes of a former journal that the store has, from which on it is worth while to leave them out.
_SHORTEN: Final = 1 << 20


class Pages(Protocol):
    """What a book needs of a journal."""

    writer: str
    before: int
    written: int
    size: int
    least: int
    open: dict[str, UsageEvent]
    keeps: bool

    def begin(self, id: str, expected: UsageEvent) -> None: ...

    def end(self, ended: Sequence[Ended]) -> None: ...

    def read(self, offset: int, number: int, most: int) -> list[Numbered]: ...

    def sync(self) -> None: ...

    def sync_name(self) -> None: ...

    def empty(self) -> None: ...

    def shortened(self) -> "Journal": ...

    def give_way(self, draft: "Journal", since: int) -> None: ...

    def close(self) -> None: ...

    def remove(self) -> None: ...


class Unwritten:
    """The journal of a store that forgets: nothing is written, all events wait in memory."""

    def __init__(self) -> None:
        self.writer = secrets.token_hex(8)
        self.before = self.written = 0
        self.size = self.least = 0
        self.open: dict[str, UsageEvent] = {}
        self.keeps = False

    def begin(self, id: str, expected: UsageEvent) -> None:
        self.open[id] = expected

    def end(self, ended: Sequence[Ended]) -> None:
        self.written += len(ended)
        for id, _ in ended:
            self.open.pop(id, None)

    def read(self, offset: int, number: int, most: int) -> list[Numbered]:
        return []

    def sync(self) -> None:
        """There is no disk."""

    def sync_name(self) -> None:
        """There is no disk."""

    def empty(self) -> None:
        """There is no file."""

    def shortened(self) -> Journal:
        raise AssertionError("there is nothing to be left out")

    def give_way(self, draft: Journal, since: int) -> None:
        raise AssertionError("there is no draft")

    def close(self) -> None:
        """There is no file."""

    def remove(self) -> None:
        """There is no file."""


@define
class Delivery:
    """Events that the store is to have in one call.

    :ivar first: the number of the first one. :ivar end: where in the journal the line after the last begins.
    :ivar tally: of the events.
    """

    first: int
    events: list[UsageEvent] = Factory(list)
    end: int = 0
    tally: Tally = Factory(Tally)


class Book:
    """A journal and how far the store has come with it.

    :param soon: see :class:`Bookkeeper`.
    :ivar added: the number of the last event that the store has.
    """

    def __init__(self, journal: Pages, soon: Soon) -> None:
        self.journal = journal
        self.added = journal.before
        self._soon = soon
        self._offset = 0
        self._pending: deque[Delivery] = deque()
        #: Whether no more is to go together with the last of these.
        self._is_sealed = False
        self._ended: list[Ended] = []
        self._is_due = False
        self._complained = False
        #: How many bytes of the journal the disk has for sure, and what was the last event in them.
        self._synced = (0, 0)
        #: Whether the disk has it under its name.
        self._has_name = False

    def end(self, id: str, event: UsageEvent) -> None:
        """A request is over, and this is what it used. What cannot be written down yet is tried again before each batch
        for the store; should the proxy be killed before, it is counted as expected."""
        self._ended.append((id, event))
        if not (self._is_due or self._complained):
            self._is_due = True
            self._soon(self.write)

    def write(self) -> None:
        """Write down what requests that are over used, as far as the disk takes it. The log is told once if it does
        not."""
        self._is_due = False
        if not self._ended:
            return
        try:
            self._write(len(self._ended))
        except OSError as error:
            if not self._complained:
                _log.error("What requests used cannot be written down: {error}", error=str(error))
            self._complained = True
        else:
            self._complained = False

    def _write(self, count: int) -> None:
        """Write down the first so many, or those before the first that the disk refuses, and keep them for the store if
        nothing before them was left out. Raises ``OSError``: not all."""
        ended, first = self._ended[:count], self.journal.written + 1
        try:
            self.journal.end(ended)
        except OSError:
            if count == 1:
                raise
            self._write(count // 2)
            self._write(count - count // 2)
            return
        del self._ended[:count]
        newest = self._pending[-1] if self._pending else None
        next_kept = self.added + 1 if newest is None else newest.first + len(newest.events)
        if first == next_kept and (first - self.added <= _MOST_PENDING or not self.journal.keeps):
            self._keep(first, [event for _, event in ended])

    def _keep(self, first: int, events: list[UsageEvent]) -> None:
        """Keep what was just written down for the store."""
        if not self._pending or self._is_sealed or len(self._pending[-1].events) >= _BATCH:
            self._pending.append(Delivery(first))
            self._is_sealed = False
        delivery = self._pending[-1]
        delivery.events += events
        delivery.end = self.journal.size
        delivery.tally.add(events)

    def next(self) -> Delivery | None:
        """Return what the store is to have next, and the disk has: else a power cut would give numbers that the store
        knows to other events."""
        most = min(self._synced[1] - self.added, _BATCH)
        if most <= 0:
            return None
        if self._pending:
            return self._pending[0]
        found = self.journal.read(self._offset, self.added + 1, most)
        if not found:
            return None
        delivery = Delivery(found[0].number, [each.event for each in found], found[-1].end)
        delivery.tally.add(delivery.events)
        return delivery

    def has(self, delivery: Delivery) -> None:
        """The store has it."""
        self.added, self._offset = delivery.first + len(delivery.events) - 1, delivery.end
        if self._pending:
            self._pending.popleft()

    async def sync(self, wait: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Have the disk take what was written so far, and under its name: a power cut would bring back a longer one
        that this has taken the place of. Raises ``OSError``.

        :param wait: calls what blocks, in a thread.
        """
        self._is_sealed = True  # what comes meanwhile may not be on the disk
        so_far = self.journal.size, self.journal.written
        if so_far[0] != self._synced[0]:
            await wait(self.journal.sync)
            if not self._has_name:
                await wait(self.journal.sync_name)
                self._has_name = True
        self._synced = so_far

    def draft(self) -> "Draft | None":
        """Return what is to take the journal's place, where requests that go on keep much in it that the store has."""
        journal = self.journal
        if self.added < journal.written or journal.size - journal.least < _SHORTEN:
            return None
        return Draft(journal.shortened(), journal.size)

    def take(self, draft: "Draft") -> None:
        """Be shorter. Raises ``OSError``: it is not."""
        self.journal.give_way(draft.journal, draft.since)
        self._offset = draft.journal.least
        for each in self._pending:
            each.end += draft.journal.least - draft.since
        self._synced = (0, self._synced[1])  # what came behind the draft may not be on the disk, nor its name
        self._has_name = False

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to be done."""
        return self.added == self.journal.written and not self.journal.open


@frozen
class Draft:
    """A journal that is to take another's place.

    :ivar since: how many bytes the other had when this was begun; what is behind them comes with it.
    """

    journal: Journal
    since: int


class Entry:
    """One request in the journal."""

    __slots__ = ("_book", "_id")

    def __init__(self, book: Book, id: str) -> None:
        self._book = book
        self._id = id

    def end(self, event: UsageEvent) -> None:
        """It is over; see :meth:`Book.end`."""
        self._book.end(self._id, event)
