"""Writing to a file descriptor that other processes share, without ever waiting.

Standard output may be a pipe or a socket whose reader has stopped, and a blocking write to it would stop the
reactor. Setting O_NONBLOCK is no way out: it belongs to the open file description, which the parent, other
workers and Twisted's own log may share, and they do not expect EAGAIN. So:

- a pipe is opened anew through ``/proc/self/fd``, which gives a description of our own to set O_NONBLOCK on;
- a socket (the journal's) takes MSG_DONTWAIT with each send;
- anything else, and a pipe that cannot be opened anew (another user's, no ``/proc``), is asked with ``poll``
  first and given at most PIPE_BUF bytes, which a pipe that polls as writable has room for. Another
  writer could still take that room in between; that is the remaining risk, on that road only. A regular file
  always polls as writable and is written as it comes: a disk is waited for.
"""

import os
import select
import socket
import stat

#: Linux takes as much for a UNIX socket in one piece (unix_stream_sendmsg): all of it or nothing.
_PIECE = 32 << 10
_NEW_FILE_MODE = 0o640
_OUR_OWN = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class LogDescriptor:
    """Writes to a descriptor, which it owns, as much as goes at once.

    Pieces to anything but a regular file are whole lines of at most PIPE_BUF bytes together, or of 32 KiB to a socket,
    where one line is no longer: those the kernel does not mix with what other processes write. Nor does it where they
    append to a file.
    """

    def __init__(self, descriptor: int) -> None:
        self._use(descriptor)

    def write(self, data: bytes) -> int:
        """Write a first part of ``data`` and return its length.

        Raises ``BlockingIOError`` if nothing can be written now, another ``OSError`` if it cannot be at all.
        """
        if self._socket is not None:
            return self._socket.send(whole_lines(data, _PIECE), socket.MSG_DONTWAIT)
        if self._regular:
            return os.write(self._descriptor, data)
        if not self._poll.poll(0):
            raise BlockingIOError
        return os.write(self._descriptor, whole_lines(data, select.PIPE_BUF))

    def replace(self, descriptor: int) -> None:
        """Write to ``descriptor`` from now on, and close the one before."""
        self.close()
        self._use(descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self._descriptor)

    def _use(self, descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        self._descriptor = descriptor
        self._regular = stat.S_ISREG(mode)
        self._socket = socket.socket(fileno=descriptor) if stat.S_ISSOCK(mode) else None
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)


def standard_output() -> int:
    """Return a new descriptor for standard output as it is now, whatever becomes of descriptor 1 later."""
    if stat.S_ISFIFO(os.fstat(1).st_mode):
        try:
            return os.open("/proc/self/fd/1", _OUR_OWN)
        except OSError:
            pass  # another user's pipe, or no /proc: the copy below is asked by poll
    return os.dup(1)


def log_file(path: str) -> int:
    """Return a descriptor for ``path``, to append to; a named pipe without a reader is an ``OSError``."""
    return os.open(path, _OUR_OWN | os.O_CREAT, _NEW_FILE_MODE)


def whole_lines(data: bytes | bytearray, most: int) -> bytes | bytearray:
    """Return of ``data`` the lines that are whole within its first ``most`` bytes, or as many bytes where none is."""
    if len(data) <= most:
        return data
    return data[: data.rfind(b"\n", 0, most) + 1 or most]
