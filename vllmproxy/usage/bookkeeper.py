"""Brings what was used from the journal to the store: in order, in batches, and again until the store has it."""

import secrets
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

from attrs import frozen
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.soon import Soon, at_once
from vllmproxy.store.interface import Store, StoreUnavailable
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.journal import Ended, Journal, Numbered, journals_in

_log = Logger()

#: Seconds between two batches.
FLUSH_SECONDS: Final = 0.25
#: Seconds for which somebody waits to be sure that the store has what was used until now.
TELL_SECONDS: Final = 2.0
#: Events in one call to the store, and events kept in memory for it; more are read from the file again.
_BATCH: Final = 500
_MOST_PENDING: Final = 10_000
#: Bytes of a journal after which another is begun, and of all of them together.
_ROTATE: Final = 8 << 20
MOST_BYTES: Final = 256 << 20
#: Bytes of a former journal that the store has, from which on it is worth while to leave them out.
_SHORTEN: Final = 1 << 20


class CannotWriteDown(Exception):
    """The journal takes no more: its disk is full, or the store has been away for too long."""


class _Pages(Protocol):
    """What a book needs of a journal."""

    writer: str
    before: int
    written: int
    size: int
    least: int
    open: dict[str, UsageEvent]

    def begin(self, id: str, expected: UsageEvent) -> None: ...

    def end(self, ended: Sequence[Ended]) -> list[Numbered]: ...

    def read(self, offset: int, number: int, most: int) -> list[Numbered]: ...

    def sync(self) -> None: ...

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

    def begin(self, id: str, expected: UsageEvent) -> None:
        self.open[id] = expected

    def end(self, ended: Sequence[Ended]) -> list[Numbered]:
        first = self.written + 1
        self.written += len(ended)
        for id, _ in ended:
            self.open.pop(id, None)
        return [Numbered(number, event, 0) for number, (_, event) in enumerate(ended, first)]

    def read(self, offset: int, number: int, most: int) -> list[Numbered]:
        return []

    def sync(self) -> None:
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


class Book:
    """A journal and how far the store has come with it.

    :param soon: see :class:`Bookkeeper`.
    :ivar added: the number of the last event that the store has.
    """

    def __init__(self, journal: _Pages, soon: Soon) -> None:
        self.journal = journal
        self.added = journal.before
        self._soon = soon
        self._offset = 0
        self._pending: deque[Numbered] = deque()
        self._ended: list[Ended] = []
        self._is_due = False
        self._complained = False
        self._synced = 0

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
        try:
            numbered = self.journal.end(self._ended[:count])
        except OSError:
            if count == 1:
                raise
            self._write(count // 2)
            self._write(count - count // 2)
            return
        del self._ended[:count]
        last = self._pending[-1].number if self._pending else self.added
        if numbered[0].number == last + 1:
            self._pending += numbered[: max(_MOST_PENDING - len(self._pending), 0)]

    def batch(self) -> list[Numbered]:
        """Return what the store is to have next."""
        if self._pending:
            return list(islice(self._pending, _BATCH))
        if self.added < self.journal.written:
            return self.journal.read(self._offset, self.added + 1, _BATCH)
        return []

    def has(self, batch: list[Numbered]) -> None:
        """The store has it."""
        self.added, self._offset = batch[-1].number, batch[-1].end
        while self._pending and self._pending[0].number <= self.added:
            self._pending.popleft()

    def needs_sync(self) -> bool:
        """Whether something was written since this was asked last."""
        synced, self._synced = self._synced, self.journal.size
        return self._synced > synced

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
        self._synced = 0

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


class Bookkeeper:
    """Takes the usage of requests and has the store add it.

    :param directory: where journals are kept; ``None``: nowhere, for a store that forgets.
    :param reactor: tells the time, and has threads for waiting on the disk.
    :param soon: when what is over is written down.
    """

    def __init__(
        self,
        store: Store,
        reactor: Any,
        directory: Path | None,
        *,
        most_bytes: int = MOST_BYTES,
        soon: Soon = at_once,
    ) -> None:
        self._store = store
        self._reactor = reactor
        self._directory = directory
        self._most_bytes = most_bytes
        self._soon = soon
        self._books: list[Book] = []
        self._ids = 0
        self._turns = DeferredLock()
        self._is_late = False
        self._loop = LoopingCall(self.flush)
        self._loop.clock = reactor

    def open(self) -> None:
        """Take over what was left behind, and begin a journal. Raises ``OSError``."""
        if self._directory is not None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in journals_in(self._directory):
                left = Journal.adopt(path)
                if left is not None:
                    self._books.append(Book(left, self._soon))
            if count := sum(book.journal.written for book in self._books):
                _log.info("{count} requests of an earlier run are being counted", count=count)
        self._begin_journal()
        self._loop.start(FLUSH_SECONDS, now=False)

    def _begin_journal(self) -> None:
        journal = Unwritten() if self._directory is None else Journal.create(self._directory)
        self._books.append(Book(journal, self._soon))

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(book.journal.size for book in self._books)

    def begin(self, expected: UsageEvent) -> Entry:
        """Write down that a request begins. Raises :class:`CannotWriteDown`: then it must not.

        :param expected: what it is counted as should the proxy be killed before it is over.
        """
        book = self._books[-1]
        self._ids += 1
        id = str(self._ids)
        try:
            if book.journal.size > _ROTATE:
                if self.size > self._most_bytes:
                    raise CannotWriteDown("the journal of usage is full")
                self._begin_journal()
                book = self._books[-1]
            book.journal.begin(id, expected)
        except OSError as error:
            raise CannotWriteDown(str(error)) from error
        return Entry(book, id)

    def flush(self) -> Deferred[None]:
        """Have the store add what there is, after what it is adding now."""
        return self._turns.run(self._flush_once)

    def tell(self) -> Deferred[None]:
        """Have the store add what there is, and fire when it has, or when that takes longer than somebody should wait.
        Whoever cancels it leaves what is being added alone."""
        waiter: Deferred[None] = Deferred(lambda _: late.cancel())
        late = self._reactor.callLater(TELL_SECONDS, waiter.callback, None)

        def told(_: object) -> None:
            if late.active():
                late.cancel()
                waiter.callback(None)

        self.flush().addBoth(told)
        return waiter

    def _flush_once(self) -> Deferred[None]:
        return Deferred.fromCoroutine(self._flush())

    async def _flush(self) -> None:
        """Go through the books; one that cannot be brought to the store does not keep the others from it."""
        is_late = False
        for book in self._books:
            book.write()
        for book in list(self._books):
            bringing: Deferred[Any] = Deferred.fromCoroutine(self._bring(book))
            error = await bringing.addErrback(self._not_brought)
            is_late = is_late or error is not None
            if isinstance(error, StoreUnavailable):
                break
        if self._is_late and not is_late:
            _log.info("The store has all usage again")
        self._is_late = is_late

    async def _bring(self, book: Book) -> None:
        if book.needs_sync():
            await self._sync(book.journal)
        while batch := book.batch():
            await self._store.add_usage(book.journal.writer, batch[0].number, [each.event for each in batch])
            book.has(batch)
        if book is self._books[-1]:
            return
        if book.is_done:
            await self._remove(book)
        else:
            await self._shorten(book)

    async def _shorten(self, book: Book) -> None:
        """Have a request that goes on for long keep no more on the disk than what it is expected to use."""
        draft = None
        try:
            draft = book.draft()
            if draft is not None:
                await self._sync(draft.journal)
                book.take(draft)
        except OSError:  # it stays as long as it is, and is tried again; a full disk is told of by those who must write
            if draft is not None:
                draft.journal.discard()

    async def _remove(self, book: Book) -> None:
        """First its events, which must not come again once the store has forgotten that it has them; and last the file,
        which has this done again until it succeeds."""
        book.journal.empty()
        if self._directory is not None:
            await self._sync(book.journal)
        await self._store.forget_writer(book.journal.writer)
        self._books.remove(book)
        book.journal.remove()

    def _sync(self, journal: _Pages) -> Deferred[None]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), journal.sync)

    def _not_brought(self, reason: Failure) -> BaseException:
        """Say so once, and hand on why."""
        if not self._is_late:
            if reason.check(StoreUnavailable):
                _log.warn("The store is away: usage waits in the journal")
            else:
                _log.failure("Adding usage failed; it waits in the journal", reason)
            self._is_late = True
        assert reason.value is not None
        return reason.value

    async def close(self) -> None:
        """Have the store add what it can now; the rest waits for the next start."""
        if not self._loop.running:
            return
        self._loop.stop()
        await self.flush()
        if self._books[-1].is_done:
            removing: Deferred[Any] = Deferred.fromCoroutine(self._remove(self._books[-1]))
            await removing.addErrback(self._not_brought)
        books, self._books = self._books, []
        for book in books:
            book.write()  # of this turn, perhaps
            book.journal.close()
