"""A body that is read whole before it is forwarded, as it comes."""

import mmap
from contextlib import suppress
from io import BytesIO
from typing import Final

#: From so many bytes on a body has memory of its own. That is taken in steps of as many where the kernel has pages so
#: large, so a body that does not come on takes no more than twice what came of it.
_LARGE: Final = 2 << 20
_HUGE_PAGES: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)


class HeldBody:
    """Gathers the pieces of one body, in one copy.

    The memory of a large one, whose length is known, is the kernel's, not the allocator's: it goes back at once, and in
    pages of 2 MiB it is there four times as fast.

    :param beginning: what has come.
    :param length: of the whole body, ``None`` if that is not known.
    """

    def __init__(self, beginning: bytes, length: int | None) -> None:
        self._length = length or 0
        self._buffer: BytesIO | mmap.mmap = BytesIO()
        self.add(beginning)

    def add(self, data: bytes) -> None:
        """Keep a piece."""
        if self._length > _LARGE and self._buffer.tell() >= _LARGE:
            self._move()
        self._buffer.write(data)

    def _move(self) -> None:
        """Give it memory of its own, if that can be had."""
        length, self._length = self._length, 0
        with suppress(OSError):
            own = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if _HUGE_PAGES is not None:
                with suppress(OSError):  # the kernel has none
                    own.madvise(_HUGE_PAGES)
            own.write(self.whole)
            self._buffer = own

    @property
    def whole(self) -> bytes | mmap.mmap:
        """All of it, where all has come. It is not copied."""
        return self._buffer.getvalue() if isinstance(self._buffer, BytesIO) else self._buffer
