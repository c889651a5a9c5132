"""What was used, written down before anybody is told: a file that outlives the process and waits for the store.

One line for each thing that happens, in the order in which it does::

    {"writer": "8f3c…", "before": 0}        the first line: what its events are numbered under; how many are left out
    ["+", "ID", {…}]                        a request begins; what it is counted as should the proxy be killed
    ["-", "ID", {…}]                        it is over: the next event

Events are numbered 1, 2, 3 … by the order of their ``-`` lines, behind those that are left out because the store has
them, so that the same file gives the same numbers whoever reads it. A request is forwarded, and the end of its answer
leaves, when its line is written, those of several that are over by one ``write``: killing the process loses nothing,
and a line that a power cut tore is passed over.
"""

import errno
import fcntl
import itertools
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from json.encoder import encode_basestring_ascii
from pathlib import Path
from time import time
from typing import Any, Final

from attrs import define
from twisted.logger import Logger

from vllmproxy.usage.event import UsageEvent

#: What a file system answers that has no disk to wait for, as some of FUSE and of containers do (fdatasync(2)).
_NOTHING_TO_WAIT_FOR: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

_log = Logger(namespace=__name__)

_SUFFIX = ".journal"
_DRAFT = ".begun"
#: Seconds after which a draft that nobody has locked is nobody's.
_LEFT: Final = 60.0


#: A request that is over, by what it was begun as, and what it used.
Ended = tuple[str, UsageEvent]


@define  # not frozen, as the event
class Numbered:
    """An event with its number, and where the line after it begins."""

    number: int
    event: UsageEvent
    end: int


class Journal:
    """One file, open for appending, and locked against every other process.

    :ivar writer: what the store knows its events under.
    :ivar before: how many events are left out of it, the first ones; ``written``: how many there are with those.
    :ivar size: bytes; ``least``: those that it began with.
    :ivar open: the requests that have begun and are not over.
    :ivar keeps: what was written can be read again.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.writer = ""
        self.before = self.written = 0
        self.size = self.least = 0
        self.open: dict[str, UsageEvent] = {}
        self.keeps = True
        #: Bytes of the first line.
        self._head = 0
        #: The file ends in what was written by half, and could not be cut off.
        self._torn = False

    @classmethod
    def create(cls, directory: Path) -> "Journal":
        """Begin a new one. Raises ``OSError``."""
        name = secrets.token_hex(8)
        journal = cls._draft(directory / f"{name}{_SUFFIX}", name, 0, {})
        try:
            journal._publish()
        except OSError:
            journal.discard()
            raise
        return journal

    @classmethod
    def _draft(cls, path: Path, writer: str, before: int, open: Mapping[str, UsageEvent]) -> "Journal":
        """Begin one that nobody may adopt before it is published. Raises ``OSError``."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        journal = cls(path, os.open(path.with_suffix(_DRAFT), flags, 0o600))
        try:
            fcntl.flock(journal._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = f'{{"writer":"{writer}","before":{before}}}'
            journal._append("\n".join([head, *itertools.starmap(_begins, open.items())]))
        except OSError:
            journal.discard()
            raise
        journal.writer, journal._head, journal.least = writer, len(head) + 1, journal.size
        journal.before = journal.written = before
        return journal

    def _publish(self) -> None:
        self.path.with_suffix(_DRAFT).rename(self.path)

    def discard(self) -> None:
        """Give up a draft, if it is one still."""
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            self.path.with_suffix(_DRAFT).unlink(missing_ok=True)

    def shortened(self) -> "Journal":
        """Begin a draft of the same that leaves out the events so far, which the store has. Raises ``OSError``."""
        return self._draft(self.path, self.writer, self.written, self.open)

    def give_way(self, draft: "Journal", since: int) -> None:
        """Be ``draft``, with all that was written behind the first ``since`` bytes. Raises ``OSError``: this is as it
        was."""
        behind = os.pread(self._descriptor, self.size - since, since).decode("ascii")
        if behind:
            draft._append(behind.removesuffix("\n"))
        draft._publish()
        former = self._descriptor
        self._descriptor, draft._descriptor = draft._descriptor, -1
        self._head, self._torn = draft._head, False
        self.before, self.size, self.least = draft.before, draft.size, draft.least
        with suppress(OSError):  # of a file that is no more
            os.close(former)

    @classmethod
    def adopt(cls, path: Path) -> "Journal | None":
        """Take over what a process left that is no more; ``None`` where it says nothing, it still runs, or another has
        taken it over. Its writer is to be forgotten even where it has no events: it may have been emptied.

        Requests that it was killed in the middle of are counted as they were expected to be: estimated, or unknown.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if not _is_ours(descriptor):
            os.close(descriptor)
            return None
        path.with_suffix(_DRAFT).unlink(missing_ok=True)  # which whoever left it was about to publish
        journal = cls(path, descriptor)
        if not journal._recover():
            journal.remove()
            return None
        return journal

    def begin(self, id: str, expected: UsageEvent) -> None:
        """Write down that a request begins. Raises ``OSError``: then it must not."""
        self._append(_begins(id, expected))
        self.open[id] = expected

    def end(self, ended: Sequence[Ended]) -> None:
        """Write down what requests used, all or nothing. Raises ``OSError``: should it stay at that, they are counted
        as expected when this is adopted."""
        lines = [f'["-",{encode_basestring_ascii(id)},{event.as_json()}]' for id, event in ended]
        self._append("\n".join(lines))
        self.written += len(ended)
        for id, _ in ended:
            self.open.pop(id, None)

    def read(self, offset: int, number: int, most: int) -> list[Numbered]:
        """Return up to ``most`` events from the line at ``offset`` on, the first of which has the number ``number``."""
        found: list[Numbered] = []
        for line, end in self._lines(offset):
            if end > self.size:  # it was refused, and could not be cut off yet
                break
            event = _event_of(line)
            if event is not None:
                found.append(Numbered(number + len(found), event, end))
                if len(found) == most:
                    break
        return found

    def sync(self) -> None:
        """Return when the disk has it. Blocks. Raises ``OSError``: it has not, but for file systems that know of no
        such thing."""
        with _nothing_to_wait_for():
            os.fdatasync(self._descriptor)

    def sync_name(self) -> None:
        """Return when the disk has it under its name, as :meth:`sync` does."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _nothing_to_wait_for():
                os.fsync(directory)
        finally:
            os.close(directory)

    def empty(self) -> None:
        """The store has all of it, and whoever reads it again is to find nothing but its writer."""
        os.ftruncate(self._descriptor, self._head)
        self.size = self._head

    def close(self) -> None:
        """Let go of the file: whoever comes next may adopt it."""
        descriptor, self._descriptor = self._descriptor, -1  # the number may soon be another file's
        if descriptor >= 0:
            os.close(descriptor)

    def remove(self) -> None:
        """Its writer is forgotten."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _append(self, lines: str) -> None:
        text = lines.encode("ascii") + b"\n"
        if self._torn:
            self._cut()
        written = os.write(self._descriptor, text)
        if written != len(text):  # a full disk took a part: the next line must not continue it
            self._torn = True
            self._cut()
            raise OSError(f"{self.path} took only a part of what was written: the disk is full")
        self.size += written

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self.size)
        self._torn = False

    def _recover(self) -> bool:
        """Read all of it; end what has begun. False where nobody can have written it."""
        for line, end in self._lines(0):
            if isinstance(line, dict) and not self.writer:
                self.writer, self._head = str(line.get("writer", "")), end
                self.before = self.written = _count_of(line.get("before"))
            elif _event_of(line) is not None:
                self.open.pop(line[1], None)
                self.written += 1
            elif _begun(line) is not None:
                self.open[line[1]] = _begun(line)  # type: ignore[assignment]  # not None, as was just seen
            self.size = end
        if self.writer:
            self._cut()  # a torn last line
            self.least = self.size
            if self.open:
                self.end(list(self.open.items()))
        return bool(self.writer)

    def _lines(self, offset: int) -> Iterator[tuple[Any, int]]:
        """Yield each whole line as what it says (``None``: nothing) and where the next one begins."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                offset += len(text)
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    _log.error("{path} has a line that cannot be read", path=str(self.path))
                    line = None
                yield line, offset


def journals_in(directory: Path) -> list[Path]:
    """Return the files of journals, oldest first."""
    return sorted(directory.glob(f"*{_SUFFIX}"), key=_changed_at)


def remove_drafts(directory: Path) -> None:
    """Remove what processes that were killed did not come to publish, as far as that is possible."""
    for path in directory.glob(f"*{_DRAFT}"):
        if time() - _changed_at(path) < _LEFT:
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _is_ours(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it was another process's
        return 0.0


@contextmanager
def _nothing_to_wait_for() -> Iterator[None]:
    """Take it for done where a file system knows of no such thing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOTHING_TO_WAIT_FOR:
            raise


def _is_ours(descriptor: int) -> bool:
    """Lock a file; false if another process has it, or was done with it before this one could lock it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


def _begins(id: str, expected: UsageEvent) -> str:
    return f'["+",{encode_basestring_ascii(id)},{expected.as_json()}]'


def _event_of(line: Any) -> UsageEvent | None:
    return _said(line, "-")


def _begun(line: Any) -> UsageEvent | None:
    return _said(line, "+")


def _said(line: Any, mark: str) -> UsageEvent | None:
    if not isinstance(line, list) or len(line) != 3 or line[0] != mark:
        return None
    try:
        return UsageEvent.of_json(line[2])
    except (AttributeError, TypeError):
        return None


def _count_of(value: Any) -> int:
    return value if isinstance(value, int) else 0
