"""The access log: one JSON object a line, on the original standard output or in a file."""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Final

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from vllmproxy.decimals import decimal
from vllmproxy.observers.descriptor import LogDescriptor, log_file, standard_output, whole_lines
from vllmproxy.observers.record import RequestRecord

_log = Logger(namespace=__name__)

_quoted: Final = encode_basestring_ascii

#: Lines wait for each other this long, in seconds, and up to this many bytes.
BATCH_SECONDS: Final = 0.1
BATCH_BYTES: Final = 64 << 10
#: When a reader that takes lines, but not all at once, is tried again: a pipe holds 64 KiB.
RETRY_SECONDS: Final = 0.01
#: What a reader that stalls can make us keep, in bytes; lines beyond it are dropped.
BUFFER_BYTES: Final = 8 << 20


def line_of(record: RequestRecord) -> bytes:
    """Return ``record`` as a line of JSON: ``time`` in RFC 3339 UTC, seconds to the µs, no ``None``.

    It is written by hand because that takes a quarter of the time of :func:`json.dumps`, on each request. All beyond
    ASCII is escaped: no control character, no C1 escape to a terminal, no lone surrogate.
    """
    seconds, milliseconds = divmod(int(record.time * 1000), 1000)
    text = (
        f'{{"time":"{_second(seconds)}.{str(1000 + milliseconds)[1:]}Z","request_id":{_quoted(record.request_id)}'
        + _who(record.method, record.route, record.client, record.key_id, record.key_alias)
    )
    if record.end_user is not None:
        text += f',"end_user":{_quoted(record.end_user)}'
    if record.model is not None:
        text += f',"model":{_quoted(record.model)}'
    text += f',"status":{record.status},"bytes_in":{record.bytes_in},"bytes_out":{record.bytes_out}'
    if record.time_to_first_byte is not None:
        text += f',"time_to_first_byte":{decimal(record.time_to_first_byte)}'
    if record.streamed is not None:
        text += ',"streamed":true' if record.streamed else ',"streamed":false'
    text += f',"duration":{decimal(record.duration)}{_tokens(record)},"ended":"{record.ended}"'
    if record.error is not None:
        text += f',"error":{_quoted(record.error)}'
    return f"{text}}}\n".encode("ascii")


@lru_cache(maxsize=256)  # a route may be as long as a request line
def _who(method: str, route: str, client: str, key_id: str | None, key_alias: str | None) -> str:
    """Return the members that one caller's lines have in common."""
    text = f',"method":{_quoted(method)},"route":{_quoted(route)},"client":{_quoted(client)}'
    if key_id is not None:
        text += f',"key_id":{_quoted(key_id)}'
    if key_alias is not None:
        text += f',"key_alias":{_quoted(key_alias)}'
    return text


def _tokens(record: RequestRecord) -> str:
    text = ""
    if record.prompt_tokens is not None:
        text += f',"prompt_tokens":{record.prompt_tokens}'
    if record.completion_tokens is not None:
        text += f',"completion_tokens":{record.completion_tokens}'
    if record.total_tokens is not None:
        text += f',"total_tokens":{record.total_tokens}'
    if record.tokens_estimated is not None:
        text += ',"tokens_estimated":true' if record.tokens_estimated else ',"tokens_estimated":false'
    return text


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class JsonLines:
    """Collects lines and writes them in batches, never waiting for whoever reads them.

    :param write: takes bytes and returns how many of them it took, or ``None`` for all. It raises
        ``BlockingIOError`` when it would have to wait, and another ``OSError`` when it cannot write.
    :ivar dropped: lines lost because the buffer was full.
    """

    def __init__(
        self,
        write: Callable[[bytes], int | None],
        clock: IReactorTime,
        *,
        reopen: Callable[[], None] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.dropped = 0
        self._write = write
        self._clock = clock
        self._reopen = reopen
        self._close = close
        self._buffer = bytearray()
        self._timer: IDelayedCall | None = None
        self._stalled = False
        self._torn = False  # the buffer begins within a line
        self._complained = False
        self._closed = False

    def started(self) -> None:
        """Do nothing: a line is for a finished request."""

    def finished(self, record: RequestRecord) -> None:
        """Add the line of ``record`` to the batch."""
        line = line_of(record)
        if self._closed or len(self._buffer) + len(line) > BUFFER_BYTES:
            self._drop()
            return
        self._buffer += line
        if len(self._buffer) >= BATCH_BYTES and not self._stalled:
            self.flush()
        elif self._timer is None:
            self._timer = self._clock.callLater(BATCH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what is waiting, as far as it is taken; the rest is tried again a little later."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        waiting = len(self._buffer)
        try:
            while self._buffer:
                # Other processes append to the same file: what they write comes in between.
                piece = bytes(whole_lines(self._buffer, BATCH_BYTES))
                self._took(piece, self._write(piece))
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._complain(error.strerror or type(error).__name__)
            self._stalled = True
            if not self._closed:
                moving = len(self._buffer) < waiting
                self._timer = self._clock.callLater(RETRY_SECONDS if moving else BATCH_SECONDS, self.flush)
        else:
            self._stalled = False
            self._recovered()

    def reopen(self) -> None:
        """Open the file anew, as after it was renamed by logrotate; standard output stays as it is.

        Raises ``OSError``, and goes on with the old file, if that cannot be done.
        """
        if self._reopen is None or self._closed:
            return
        self.flush()
        self._reopen()
        if self._torn:  # its beginning is in the old file
            del self._buffer[: self._buffer.index(b"\n") + 1]
            self._torn = False
            self._drop()

    def close(self) -> None:
        """Write what can be written at once, and let go. Idempotent; later records are dropped."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        self.dropped += self._buffer.count(b"\n")
        self._buffer.clear()
        if self._close is not None:
            self._close()

    def _took(self, piece: bytes, taken: int | None) -> None:
        taken = len(piece) if taken is None else taken
        if taken == 0:
            raise BlockingIOError
        self._torn = self._buffer[taken - 1] != ord("\n")
        del self._buffer[:taken]

    def _recovered(self) -> None:
        if self._complained:
            self._complained = False
            _log.info("The access log is written again; {dropped} lines are lost", dropped=self.dropped)

    def _drop(self) -> None:
        self.dropped += 1
        if not self._closed:
            self._complain("nobody reads it, and its buffer is full")

    def _complain(self, reason: str) -> None:
        """Say once, until it is mended, that something is wrong."""
        if not self._complained:
            self._complained = True
            _log.error("The access log cannot be written: {reason}. Lines will be lost", reason=reason)


def open_access_log(target: str, clock: IReactorTime) -> JsonLines:
    """Return the access log that ``--access-log`` names.

    :param target: ``-`` for standard output as it is now (a daemon has none: :mod:`vllmproxy.tap` warns of that), or
        the path of a file, made with mode 0640 if it does not exist.

    Raises ``OSError`` if it cannot be opened.
    """
    if target == "-":
        descriptor = LogDescriptor(standard_output())
        return JsonLines(descriptor.write, clock, close=descriptor.close)
    descriptor = LogDescriptor(log_file(target))
    return JsonLines(
        descriptor.write,
        clock,
        reopen=lambda: descriptor.replace(log_file(target)),
        close=descriptor.close,
    )
