"""What an answer says it used, in one shape whatever API said it."""

from typing import Literal

from attrs import define

_MOST_TOKENS = 2**50
#: A year of audio; what is longer is none.
_MOST_SECONDS = 366 * 86_400.0
_LONGEST_MODEL = 256

#: What vLLM's ``UsageInfo`` may have; one with nothing else is read in fewer steps.
_USAGE_INFO = frozenset(
    {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details"}
)


@define(kw_only=True)  # not frozen, which takes twice as long to make
class Usage:
    """The tokens of one answer; ``None`` is "not said", never a guess at zero.

    :ivar prompt_tokens: tokens read, those found in the prefix cache included.
    :ivar completion_tokens: tokens made, reasoning included.
    :ivar total_tokens: as reported, else the sum of the two where both are known.
    :ivar cached_prompt_tokens: how many of ``prompt_tokens`` came out of the prefix cache.
    :ivar audio_seconds: length of the audio that was read, where that is what the answer counts.
    :ivar source: ``"reported"`` by vLLM, or ``"counted"``: a stream without a final usage, whose
        ``completion_tokens`` is the number of events that carried a delta, but for the role that a chat begins
        with. That is an estimate: an event can hold several tokens (speculative decoding) or none (the role of
        each further choice).
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    audio_seconds: float | None = None
    source: Literal["reported", "counted"] = "reported"


def member(value: object, key: str) -> object:
    """Return ``value[key]`` if ``value`` is a decoded JSON object that has it, else ``None``."""
    return value.get(key) if isinstance(value, dict) else None


def model_from(answer: object) -> str | None:
    """Return the model that a decoded answer or event names: at its top, in ``message`` or ``response``."""
    if not isinstance(answer, dict):
        return None
    model = answer.get("model")
    if isinstance(model, str) and 0 < len(model) <= _LONGEST_MODEL:
        return model
    for holder in (answer.get("message"), answer.get("response")):
        model = member(holder, "model")
        if isinstance(model, str) and 0 < len(model) <= _LONGEST_MODEL:
            return model
    return None


def usage_from(found: object) -> Usage | None:
    """Return what a decoded ``usage`` object says, or ``None`` if it says nothing that is understood.

    Understood are vLLM's ``UsageInfo`` (chat, completions, pooling, rerank, streamed transcription),
    ``ResponseUsage``, ``AnthropicUsage``, ``CohereUsage`` and the transcription's ``{"type": "duration"}``.
    """
    if not isinstance(found, dict):
        return None
    if "prompt_tokens" in found and found.keys() <= _USAGE_INFO:
        prompt, completion = _count(found["prompt_tokens"]), _count(found.get("completion_tokens"))
        details, seconds = found.get("prompt_tokens_details"), None
        cached = None if details is None else _count(member(details, "cached_tokens"))
    else:
        prompt, completion = _pair(found)
        cached, seconds = _cached(found), _seconds(found.get("seconds"))
    total = _count(found.get("total_tokens"))
    if total is None and prompt is not None and completion is not None:
        total = prompt + completion
    if (prompt, completion, total, cached, seconds) == (None, None, None, None, None):
        return None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=total,
        cached_prompt_tokens=cached,
        audio_seconds=seconds,
    )


def with_prompt_of(usage: Usage, start: Usage | None) -> Usage:
    """Fill what ``usage`` does not say of the prompt from ``start``, the usage at a message's start."""
    if start is None or usage.prompt_tokens is not None:
        return usage
    prompt, completion = start.prompt_tokens, usage.completion_tokens
    total = None if prompt is None or completion is None else prompt + completion
    cached = start.cached_prompt_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=usage.completion_tokens,
        total_tokens=total,
        cached_prompt_tokens=cached,
        audio_seconds=usage.audio_seconds,
        source=usage.source,
    )


def _pair(found: dict[str, object]) -> tuple[int | None, int | None]:
    """Return prompt and completion tokens."""
    if "prompt_tokens" in found or "completion_tokens" in found:
        return _count(found.get("prompt_tokens")), _count(found.get("completion_tokens"))
    for nested in (found.get("tokens"), found.get("billed_units")):  # Cohere
        if isinstance(nested, dict):
            return _count(nested.get("input_tokens")), _count(nested.get("output_tokens"))
    prompt = _count(found.get("input_tokens"))
    if prompt is not None:
        # Anthropic's input_tokens leaves out what the cache gave and took; the Responses API's does not, and
        # has neither of these two members.
        for key in ("cache_read_input_tokens", "cache_creation_input_tokens"):
            prompt += _count(found.get(key)) or 0
    return prompt, _count(found.get("output_tokens"))


def _cached(found: dict[str, object]) -> int | None:
    for details in ("prompt_tokens_details", "input_tokens_details"):
        cached = _count(member(found.get(details), "cached_tokens"))
        if cached is not None:
            return cached
    cached = _count(found.get("cache_read_input_tokens"))
    return _count(found.get("cached_tokens")) if cached is None else cached


def _count(value: object) -> int | None:
    """Return a token count; Cohere's are floats, and JSON's ``true`` is no number."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def _seconds(value: object) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        seconds = float(value)  # type: ignore[arg-type]  # narrowed by type() above, which bool does not pass
    except OverflowError:
        return None
    return seconds if 0 <= seconds <= _MOST_SECONDS else None
