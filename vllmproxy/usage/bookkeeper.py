"""Brings what was used from the journal to the store: in order, in batches, and again until the store has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.soon import Soon, at_once
from vllmproxy.store.interface import Store, StoreUnavailable
from vllmproxy.usage.book import Book, Entry, Unwritten
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.journal import Journal, journals_in, remove_drafts

_log = Logger(namespace=__name__)

#: Seconds between two batches.
FLUSH_SECONDS: Final = 0.25
#: Seconds for which somebody waits to be sure that the store has what was used until now.
TELL_SECONDS: Final = 2.0
#: Bytes of a journal after which another is begun, and of all of them together.
_ROTATE: Final = 8 << 20
MOST_BYTES: Final = 256 << 20


class CannotWriteDown(Exception):
    """The journal takes no more: its disk is full, or the store has been away for too long."""


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
            remove_drafts(self._directory)
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
        late: IDelayedCall = self._reactor.callLater(TELL_SECONDS, waiter.callback, None)

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
        await book.sync(self._wait_for)
        while delivery := book.next():
            await self._store.add_usage(book.journal.writer, delivery.first, delivery.events, delivery.tally)
            book.has(delivery)
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
                await self._wait_for(draft.journal.sync)
                book.take(draft)
        except OSError:  # it stays as long as it is, and is tried again; a full disk is told of by those who must write
            if draft is not None:
                draft.journal.discard()

    async def _remove(self, book: Book) -> None:
        """First its events, which must not come again once the store has forgotten that it has them; and last the file,
        which has this done again until it succeeds."""
        book.journal.empty()
        if self._directory is not None:
            await self._wait_for(book.journal.sync)
        await self._store.forget_writer(book.journal.writer)
        self._books.remove(book)
        book.journal.remove()

    def _wait_for(self, disk: Callable[[], None]) -> Deferred[None]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), disk)

    def _not_brought(self, reason: Failure) -> BaseException:
        """Say so once, and hand on why."""
        if not self._is_late:
            if reason.check(StoreUnavailable):
                _log.warn("The store is away: usage waits in the journal")
            elif reason.check(OSError):
                _log.error("The disk fails the journal of usage: {error}", error=reason.getErrorMessage())
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
