"""Usage out of a stream of server-sent events (WHATWG HTML, section 9.2)."""

import json
import re

from vllmproxy.usage.jsonbody import decoded
from vllmproxy.usage.tokens import Usage, member, model_from, usage_from, with_prompt_of

#: A line, or an event's data, longer than this is passed over.
LONGEST_LINE = 1 << 20

_raw_decode = json.JSONDecoder().raw_decode
_KEY = b'"usage"'
#: A report of usage; in a JSON string the quotes of this key would be escaped.
USAGE = re.compile(rb'"usage"\s*:\s*\{')
#: A choice, and the first digits of its index, which vLLM writes first: no more than so many are told apart.
_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{(?:\s*"index"\s*:\s*([0-9]{1,5}))?')
#: How a chat begins: no token yet.
_ROLE_ONLY = re.compile(rb'"delta"\s*:\s*\{\s*"role"\s*:\s*"assistant"\s*,\s*"content"\s*:\s*""\s*[,}]')
#: Of a report, no more is kept for each choice.
_LONGEST_REPORT = 512
#: Choices of one stream that are told apart.
_MOST_CHOICES = 4096
_COMMENT = b":"


class SseReader:
    """Follows the events of a stream, in any pieces; decodes the first, and the last with usage.

    Understood are vLLM's chat, completion, generate and transcription chunks, ``response.completed`` and its kin
    of the Responses API, Messages, and Cohere's ``message-end``. The last ``usage`` wins, so that
    ``continuous_usage_stats`` on a stream cut short is still the truth: there each choice has its own, and the last
    ones are added up. A lone CR does not end a line here: no server of these APIs sends one.

    :ivar counted: events so far that carried a delta or a choice; a mere report of usage does not.
    """

    def __init__(self) -> None:
        self.counted = 0
        self._tail = bytearray()  # a line whose end has not come yet
        self._skipping = False  # that line grew too long
        self._data: bytes | None = None  # the event's first data line, with its "data:"
        self._more = bytearray()  # its further data lines, hardly ever any
        self._begun = False
        self._model: str | None = None
        self._start: Usage | None = None  # of Messages' message_start: its prompt is final, the rest is not
        self._report: bytes | None = None  # the last event with usage
        self._each: dict[bytes | None, bytes] = {}  # what it last told of each choice, if it does

    def feed(self, data: bytes) -> None:
        """Take the next piece of the stream, of any length."""
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines:
            if self._tail or self._skipping:
                lines[0] = self._end_of_line(lines[0])
            for line in lines:
                if line.startswith(b"data:"):
                    self._data_line(line)
                elif (not line or line == b"\r") and self._data is not None:
                    self._dispatch(self._data)
        if rest and not self._skipping:
            self._tail += rest
            if len(self._tail) > LONGEST_LINE:
                self._skipping = True
                self._tail.clear()

    @property
    def is_between(self) -> bool:
        """Whether the stream stands between two events, the first of which has come."""
        return self._begun and self._data is None and not self._tail and not self._skipping

    def finish(self) -> tuple[str | None, Usage | None]:
        """Return the model and the usage; one that no event reported is ``"counted"``, if anything was."""
        if self._data is not None:
            self._dispatch(self._data)
        usage = None if self._report is None else self._reported(decoded_event(self._report))
        if usage is None and (self.counted or self._start):
            usage = Usage(completion_tokens=self.counted, source="counted")
        return self._model, usage and with_prompt_of(usage, self._start)

    def _end_of_line(self, end: bytes) -> bytes:
        """Return the whole of the line that ``end`` ends, or a comment in place of one that is too long."""
        line = _COMMENT if self._skipping else bytes(self._tail) + end
        self._skipping = False
        self._tail.clear()
        return line

    def _data_line(self, line: bytes) -> None:
        if len(line) > LONGEST_LINE:
            return
        if self._data is None:
            self._data = line
        elif len(self._data) + len(self._more) + len(line) <= LONGEST_LINE:
            self._more += b"\n" + line[5:]

    def _dispatch(self, data: bytes) -> None:
        """Look at one whole event. This is what each token costs, so it does little."""
        self._data = None
        if self._more:
            data += self._more
            self._more.clear()
        if not self._begun:
            self._begin(data)
        # A null usage is on every chunk of some.
        if _KEY in data and (usage := USAGE.search(data)):
            self._report = data
            choice = _CHOICE.search(data)
            if choice is None:  # it is of all of them
                self._each = {}
            else:
                self.counted += 1
                if len(self._each) < _MOST_CHOICES or choice[1] in self._each:
                    self._each[choice[1]] = data[usage.end() - 1 : usage.end() + _LONGEST_REPORT]
        elif b'"choices"' in data or b'"delta"' in data:
            self.counted += 1

    def _reported(self, event: object) -> Usage | None:
        """Return the usage in the last event that has any, or with that of the other choices."""
        usage = _usage_of(event)
        if usage is None or len(self._each) < 2:
            return usage
        reports = [report for report in map(_beginning, self._each.values()) if report is not None]
        return _sum(reports or [usage], of_prompts=member(event, "object") == "text_completion")

    def _begin(self, data: bytes) -> None:
        """Read the stream's first event, which names the model."""
        self._begun = True
        event = decoded_event(data)
        self._model = model_from(event)
        self._start = usage_from(member(member(event, "message"), "usage"))
        if _ROLE_ONLY.search(data):
            self.counted -= 1


def decoded_event(data: bytes) -> object:
    """Return the JSON value of an event's data, which begins with its ``data:``; ``None`` where it has none."""
    try:
        return decoded(data[5:].lstrip(b" "))
    except (ValueError, RecursionError):
        return None


def _usage_of(event: object) -> Usage | None:
    """Return the usage in a chunk, in the Responses API's ``response``, or in Cohere's ``delta``."""
    for holder in (event, member(event, "response"), member(event, "delta")):
        usage = usage_from(member(holder, "usage"))
        if usage is not None:
            return usage
    return None


def _beginning(report: bytes) -> Usage | None:
    """Return the usage that ``report`` begins with."""
    try:
        return usage_from(_raw_decode(report.decode("utf-8", "replace"))[0])
    except (ValueError, RecursionError):
        return None


def _sum(reports: list[Usage], *, of_prompts: bool) -> Usage:
    """Return what all choices used, which have one prompt, or ``of_prompts`` each its own.

    Of a completion with several prompts and several answers (``n``) to each, nothing tells which choices share one: it
    counts for each of them.
    """
    prompts = [report.prompt_tokens or 0 for report in reports]
    prompt = sum(prompts) if of_prompts else max(prompts)
    completion = sum(report.completion_tokens or 0 for report in reports)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
