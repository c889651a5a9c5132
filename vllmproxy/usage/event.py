"""What one request used, as it is written down and added to the sums exactly once."""

from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Literal, Self, get_args

import attrs
from attrs import frozen

#: Where the token counts come from: vLLM said them; they were counted from events or estimated; the answer may have
#: used some and nobody could read how many; there was nothing to count (``GET /metrics``).
Quality = Literal["reported", "estimated", "unknown", "none"]


@frozen(kw_only=True)
class UsageEvent:
    """One request's use.

    :ivar time: when it was admitted, seconds since the epoch; its sums are those of that UTC day.
    :ivar key: the virtual key's token (sha256 hex), ``"master"``, or ``""`` while authentication is off.
    :ivar model: as vLLM named it, ``""`` where nobody did.
    :ivar end_user: ``""`` where none was named.
    :ivar requests: 1; 0 where nothing was forwarded after all and only ``held`` is given back.
    :ivar prompt_tokens: cached ones included.
    :ivar audio_ms: milliseconds of audio read.
    :ivar spend: money in micro-units.
    :ivar period: the start of the key's budget period that it was reserved in, whole seconds since the epoch; 0 for a
        budget that is never renewed.
    :ivar held: what was reserved of the money budget, in micro-units; ``held_tokens``: of the token budget. Both are
        let go of when the event is added, and ``spend`` and the tokens take their place.
    """

    time: float
    key: str
    model: str = ""
    end_user: str = ""
    requests: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    audio_ms: int = 0
    spend: int = 0
    quality: Quality = "none"
    period: int = 0
    held: int = 0
    held_tokens: int = 0

    @property
    def day(self) -> str:
        """The UTC day, ``2026-11-26``."""
        return datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d")

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def is_of_virtual_key(self) -> bool:
        """Whether there is an account to keep: neither the master key nor nobody has one."""
        return self.key not in ("", "master")

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`of_json` reads; what is as by default is left out."""
        return {name: value for name, value in zip(_NAMES, _values(self), strict=True) if value != _DEFAULTS.get(name)}

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Self:
        """Return the event that :meth:`as_json` made ``fields`` of.

        :raises TypeError: they are not an event's, or one of them is not what it can be.
        """
        event = cls(**fields)
        texts, numbers = _texts(event), _numbers(event)
        if not all(isinstance(text, str) for text in texts) or event.quality not in get_args(Quality):
            raise TypeError("a text is none")
        if not all(type(number) is int and 0 <= number <= _MOST for number in numbers):
            raise TypeError("a number is none")
        if not isinstance(event.time, int | float) or not 0 <= event.time <= _END_OF_TIME:
            raise TypeError("the time is none")
        return event


_NAMES = tuple(a.name for a in attrs.fields(UsageEvent))
_values = attrgetter(*_NAMES)
_texts = attrgetter("key", "model", "end_user", "quality")
_numbers = attrgetter(*(name for name in _NAMES if name not in ("time", "key", "model", "end_user", "quality")))
_MOST = 1 << 53
#: The last moment that a calendar of four digits knows.
_END_OF_TIME = 253_402_300_799
_DEFAULTS = {a.name: a.default for a in attrs.fields(UsageEvent) if a.default is not attrs.NOTHING}
