"""Takes the usage event that the client did not ask for out of a stream: bytes in, bytes out.

With ``include_usage``, vLLM 0.32 (``chat_completion_stream_generator``, ``completion_stream_generator``) does two
things that a client can see, whatever the model, ``n``, tools or log probabilities:

- one event more, the last before ``[DONE]``, with ``"choices":[]`` and a ``usage`` object. No other event is like it;
- ``system_fingerprint`` stands in that event, and not, as otherwise, at the end of each event with a ``finish_reason``.

So this takes the one out, and puts the other back where the stream would have had it.
"""

import re
from typing import Final

from vllmproxy.usage.sse import decoded_event

#: An event longer than this passes as it comes, neither taken out nor added to.
LONGEST_EVENT: Final = 64 << 10

_EVENT_END: Final = re.compile(rb"\n\r?\n")
_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{')
# In a JSON string, the quotes of these would be escaped.
_FINGERPRINT: Final = re.compile(rb',"system_fingerprint":"(?:[^"\\]|\\.)*"')
_FINGERPRINT_KEY: Final = b'"system_fingerprint":'


class Withholder:
    """The filter for the answer of one request that :func:`vllmproxy.inspection.splice.usage_edits` changed.

    What has come is passed in the same call, but for an event that has not ended yet, and one with a ``finish_reason``,
    which waits for the next event: vLLM sends the usage right behind the last of them. Comments are events, too.

    Where several answers (``n``, several prompts) end at different times, the earlier ends have gone by the time that
    the fingerprint is told. It is the same for as long as a server runs: hand in what the last stream from it told.

    :ivar fingerprint: what to put in, as vLLM wrote it, with its comma; empty if there is none; ``None`` if not known.
    """

    def __init__(self, fingerprint: bytes | None = None) -> None:
        self.fingerprint = fingerprint
        self._waiting: list[bytes] = []  # whole events with a finish_reason, the last that came
        self._rest = b""  # the beginning of an event
        self._long = False  # of which more than this has passed already
        self._passing = False  # there is nothing more to look for

    def feed(self, data: bytes) -> bytes:
        """Take the next piece of the stream, of any length, and return what the client may have now."""
        if self._passing:
            return data
        out: list[bytes] = []
        data = self._rest + data
        at = 0
        if self._long:
            at = self._end_of_long(data)
            out.append(data[:at])
        end = _last_end(data, at)
        if end > at:
            at = self._events(data, at, end, out)
        self._rest = data[at:]
        if self._passing or self._long or len(self._rest) > LONGEST_EVENT:
            self._let_go(out)
        return b"".join(out)

    @property
    def is_between(self) -> bool:
        """Whether the stream stands between two events, and nothing waits."""
        return not (self._rest or self._waiting or self._long)

    def finish(self) -> bytes:
        """Return what is left at the end of the stream, or where it was cut off."""
        out: list[bytes] = []
        if self._rest and not self._passing:
            self._event(self._rest, out)
        self._release(out)
        self._rest = b""
        return b"".join(out)

    def _end_of_long(self, data: bytes) -> int:
        """Return how much of ``data`` belongs to a long event that is on its way out."""
        match = _EVENT_END.search(data)
        self._long = match is None
        return 0 if match is None else match.end()

    def _let_go(self, out: list[bytes]) -> None:
        """Pass what has come of an event that is too long, but for what may be the first bytes of its end."""
        keep = 0 if self._passing else 2
        self._long = not self._passing
        self._release(out)
        out.append(self._rest[: len(self._rest) - keep])
        self._rest = self._rest[len(self._rest) - keep :]

    def _events(self, data: bytes, at: int, end: int, out: list[bytes]) -> int:
        """Look at the whole events from ``at`` to ``end``, and return up to where. Nearly all cost two searches."""
        if not self._waiting and not _USAGE.search(data, at, end) and not _FINISH.search(data, at, end):
            out.append(data[at:end])
            return end
        for match in _EVENT_END.finditer(data, at, end):
            if self._passing:
                break
            self._event(data[at : match.end()], out)
            at = match.end()
        return at

    def _event(self, event: bytes, out: list[bytes]) -> None:
        if _USAGE.search(event):
            self._passing = True
            if _is_extra(event):
                fingerprint = _FINGERPRINT.search(event)
                self.fingerprint = b"" if fingerprint is None else fingerprint[0]
                event = event[: len(event) - len(event.lstrip(b"\r\n"))]
            # Else the server reports usage on every event, asked or not (--enable-force-include-usage), and the extra
            # event is what the client would have seen.
        elif _FINISH.search(event):
            self._waiting.append(event)
            if sum(map(len, self._waiting)) > LONGEST_EVENT:
                self._release(out)
            return
        self._release(out)
        out.append(event)

    def _release(self, out: list[bytes]) -> None:
        fingerprint = self.fingerprint
        out += [_stamped(event, fingerprint) for event in self._waiting] if fingerprint else self._waiting
        self._waiting = []


def _last_end(data: bytes, at: int) -> int:
    """Return where the last event that is whole ends in ``data``, from ``at`` on; ``at`` if none is."""
    plain = data.rfind(b"\n\n", at)
    carriage = data.rfind(b"\n\r\n", at)
    return max(plain + 2 if plain >= 0 else at, carriage + 3 if carriage >= 0 else at)


def _is_extra(event: bytes) -> bool:
    line = event.strip()
    if not line.startswith(b"data:") or b"\n" in line:
        return False
    chunk = decoded_event(line)
    return isinstance(chunk, dict) and chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)


def _stamped(event: bytes, fingerprint: bytes) -> bytes:
    """Return ``event`` with ``fingerprint`` as its last member, where vLLM writes it."""
    end = event.rfind(b"}")
    if _FINGERPRINT_KEY in event or end < 0:
        return event
    return event[:end] + fingerprint + event[end:]
