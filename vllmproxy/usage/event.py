"""What one request used, as it is written down and added to the sums exactly once."""

from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final, Literal, Self, get_args

from attrs import define

from vllmproxy.decimals import decimal

_quoted: Final = encode_basestring_ascii

#: Where the token counts come from: vLLM said them; they were counted from events or estimated; the answer may have
#: used some and nobody could read how many; there was nothing to count (``GET /metrics``).
Quality = Literal["reported", "estimated", "unknown", "none"]


#: The largest number that one may have.
MOST: Final = 1 << 53


@define(kw_only=True)  # not frozen, which takes three times as long to make: there are two for each request
class UsageEvent:
    """One request's use.

    :ivar time: when it was admitted, seconds since the epoch, written down to the microsecond; its sums are those of
        that UTC day.
    :ivar key: the virtual key's token (sha256 hex), ``"master"``, or ``""`` while authentication is off.
    :ivar model: as vLLM named it, ``""`` where nobody did.
    :ivar end_user: ``""`` where none was named.
    :ivar requests: 1; 0 where nothing was forwarded after all.
    :ivar prompt_tokens: cached ones included.
    :ivar audio_ms: milliseconds of audio read.
    :ivar spend: money in micro-units.
    :ivar period: the start of the key's budget period that it was reserved in, whole seconds since the epoch; 0 for a
        budget that is never renewed.
    :ivar held: what was reserved of the money budget, in micro-units; ``held_tokens``: of the token budget. Both are
        let go of when the event is added, and ``spend`` and the tokens take their place.
    :ivar held_on: the day on which they are held, see :class:`~vllmproxy.limits.values.Granted`.
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
    held_on: int = 0

    @property
    def day(self) -> str:
        """The UTC day, ``2026-11-26``."""
        return _date_of(int(self.time // 86_400))

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def is_of_virtual_key(self) -> bool:
        """Whether there is an account to keep: neither the master key nor nobody has one."""
        return self.key not in ("", "master")

    def as_json(self) -> str:
        """Return the JSON object that :meth:`of_json` reads; what is as by default is left out, but for
        ``held_on`` of what is held.

        It is written by hand because that takes a fraction of the time of :func:`json.dumps`, twice for each request.
        """
        text = f'{{"time":{decimal(self.time)}' + _whose(self.key, self.model)
        if self.end_user:
            text += f',"end_user":{_quoted(self.end_user)}'
        if self.requests != 1:
            text += f',"requests":{self.requests}'
        if self.prompt_tokens:
            text += f',"prompt_tokens":{self.prompt_tokens}'
        if self.completion_tokens:
            text += f',"completion_tokens":{self.completion_tokens}'
        if self.cached_tokens:
            text += f',"cached_tokens":{self.cached_tokens}'
        if self.audio_ms:
            text += f',"audio_ms":{self.audio_ms}'
        if self.spend:
            text += f',"spend":{self.spend}'
        if self.quality != "none":
            text += f',"quality":"{self.quality}"'
        if self.period:
            text += f',"period":{self.period}'
        if self.held or self.held_tokens or self.held_on:
            text += self._holds_as_json()
        return f"{text}}}"

    def _holds_as_json(self) -> str:
        text = f',"held":{self.held}' if self.held else ""
        if self.held_tokens:
            text += f',"held_tokens":{self.held_tokens}'
        return f'{text},"held_on":{self.held_on}'

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Self:
        """Return the event whose :meth:`as_json` says ``fields``.

        What another version wrote is understood as far as it goes: what is not known is passed over, and what is held
        is held on the day of ``time`` if nothing else is said.

        :raises TypeError: they are not an event's, or one of them is not what it can be.
        """
        known = {name: value for name, value in fields.items() if name in _KNOWN}
        if not all(isinstance(known.get(name, ""), str) for name in _TEXTS):
            raise TypeError("a text is none")
        if known.get("quality", "none") not in get_args(Quality):
            raise TypeError("the quality is none")
        if not all(type(number := known.get(name, 0)) is int and 0 <= number <= MOST for name in _NUMBERS):
            raise TypeError("a number is none")
        if not isinstance(known.get("time"), int | float) or not 0 <= known["time"] <= _END_OF_TIME:
            raise TypeError("the time is none")
        event = cls(**known)
        if (event.held or event.held_tokens) and "held_on" not in fields:
            event.held_on = int(event.time // 86_400)
        return event


@lru_cache(maxsize=1024)
def _whose(key: str, model: str) -> str:
    """Return the members that a key's events of one model have in common."""
    text = f',"key":{_quoted(key)}'
    return f'{text},"model":{_quoted(model)}' if model else text


@lru_cache(maxsize=16)
def _date_of(days: int) -> str:
    return datetime.fromtimestamp(days * 86_400, UTC).strftime("%Y-%m-%d")


_TEXTS = ("key", "model", "end_user", "quality")
_NUMBERS = (
    *("requests", "prompt_tokens", "completion_tokens", "cached_tokens", "audio_ms", "spend", "period"),
    *("held", "held_tokens", "held_on"),
)
_KNOWN = frozenset(("time", *_TEXTS, *_NUMBERS))
#: The last moment that a calendar of four digits knows.
_END_OF_TIME = 253_402_300_799
