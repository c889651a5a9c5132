"""What every answer shares: errors as vLLM words them, ids, token counts, and the job that a request is."""

import json
from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from vllmproxy.simulator.config import SimulatorConfig

Json = dict[str, Any]
#: One piece of an event stream: whether it waits for the next token, and its bytes.
Event = tuple[bool, bytes]

MAX_MODEL_LEN = 32768
FINGERPRINT = "vllm-0.32.0-simulated"
DONE: Event = (False, b"data: [DONE]\n\n")
_DEFAULT_TOKENS = 16
_WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "small",
    "birds",
)


class Refusal(Exception):
    """The request is answered with an error; ``content`` is its JSON body."""

    def __init__(self, status: int, content: Json) -> None:
        super().__init__(status)
        self.status = status
        self.content = content


@frozen(kw_only=True)
class Ask:
    """A request that a shape answers.

    :ivar id: the request id, from ``X-Request-Id`` or made up.
    :ivar now: seconds since the epoch.
    :ivar tokens: how many tokens the answer has before it stops by itself, or ``None``.
    :ivar length: bytes of the request's body, for the routes that take no JSON.
    """

    body: Json
    id: str
    now: int
    config: SimulatorConfig
    tokens: int | None = None
    length: int = 0


@frozen(kw_only=True)
class Job:
    """One generation: how much was asked, how much is said, and why it ends."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    tokens: int
    finish: str
    choices: int = 1

    @property
    def completion_tokens(self) -> int:
        """Tokens over all choices."""
        return self.tokens * self.choices


@frozen(kw_only=True)
class Whole:
    """An answer in one piece; with a job it takes as long as the job's tokens do."""

    content: Json | list[Any] | bytes
    status: int = 200
    job: Job | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_type: bytes = b"application/json"


@frozen(kw_only=True)
class Stream:
    """An answer as server-sent events."""

    events: Iterator[Event] = field(eq=False)
    job: Job


Reply = Whole | Stream


def dumps(content: Any) -> bytes:
    """Return JSON as Starlette writes it."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def sse(content: Json, *, name: str | None = None, waits: bool = False) -> Event:
    """Return one server-sent event; ``waits`` if it carries a token that takes time."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return waits, head + b"data: " + dumps(content) + b"\n\n"


def error(status: int, type: str, message: str, param: str | None = None) -> Refusal:
    """Return an error as vLLM's OpenAI routes give it: ``code`` is a number."""
    return Refusal(status, {"error": {"message": message, "type": type, "param": param, "code": status}})


def invalid(details: list[Json]) -> Refusal:
    """Return the 400 that vLLM makes of pydantic's complaints."""
    count = f"{len(details)} validation error{'s' if len(details) > 1 else ''}:"
    lines = [count, *(f"  {detail}" for detail in details)]
    return error(400, "Bad Request", "\n".join(lines), str(details[0]["loc"]))


def bad_value(name: str, value: object, message: str) -> Refusal:
    """Return the 400 of a parameter out of range."""
    return error(400, "BadRequestError", f"{message} (parameter={name}, value={value})", name)


def required(body: Json, *names: str) -> None:
    """Raise unless each of the names is in the body."""
    shown = f"<dict of {len(body)} items>"
    missing = [name for name in names if body.get(name) is None]
    if missing:
        raise invalid(
            [{"type": "missing", "loc": f"body.{n}", "msg": "Field required", "input": shown} for n in missing]
        )


def parse_json(data: bytes) -> Json:
    """Return the JSON object in a request body, or raise vLLM's 400 for what is not one."""
    if not data:
        raise invalid([{"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}])
    try:
        body = json.loads(data)
    except json.JSONDecodeError as reason:
        raise _not_json(f"body.{reason.pos}", reason.msg) from None
    except (UnicodeDecodeError, RecursionError):
        raise _not_json("body.0", "There was an error parsing the body") from None
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        shown = f"<list of {len(body)} items>" if isinstance(body, list) else str(body)
        raise invalid([{"type": "model_attributes_type", "loc": "body", "msg": message, "input": shown}])
    return body


def _not_json(where: str, why: str) -> Refusal:
    detail: Json = {"type": "json_invalid", "loc": where, "msg": "JSON decode error"}
    return invalid([detail | {"input": "<dict of 0 items>", "ctx": {"error": why}}])


def check_model(ask: Ask) -> str:
    """Return the model that answers, or raise vLLM's 404."""
    model = ask.body.get("model")
    if model in (None, "", ask.config.model):
        return ask.config.model
    message = f"The model `{model}` does not exist. Valid aliases: {ask.config.model}."
    raise error(404, "NotFoundError", message, "model")


def count_tokens(value: object) -> int:
    """Return how many tokens a prompt has: its words, or its numbers where it is tokens already.

    Takes the shapes of every route: a string, a list of them, of token ids, of messages, of content parts.
    """
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, int):
        return 1
    if isinstance(value, dict):
        return sum(count_tokens(value.get(name)) for name in ("content", "text", "input"))
    if isinstance(value, list):
        return sum(count_tokens(item) for item in value)
    return 0


def make_job(ask: Ask, prefix: str, prompt: object, *, limit: object, name: str = "max_tokens") -> Job:
    """Return the generation that a request asks for.

    :param limit: the request's own limit, called ``name``; ``None`` where it gives none.
    """
    model = check_model(ask)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        message = "Input should be a valid integer, unable to parse string as an integer"
        raise invalid([{"type": "int_parsing", "loc": f"body.{name}", "msg": message, "input": str(limit)}])
    if limit is not None and limit < 1:
        raise bad_value(name, limit, f"{name} must be at least 1, got {limit}.")
    if limit is not None and limit > MAX_MODEL_LEN:
        message = f"{name}={limit} cannot be greater than max_model_len={MAX_MODEL_LEN}."
        raise bad_value(name, limit, f"{message} Please request fewer output tokens.")
    tokens, finish = _length_of(limit, ask.config.answer_tokens if ask.tokens is None else ask.tokens)
    return Job(
        id=f"{prefix}{ask.id}",
        created=ask.now,
        model=model,
        prompt_tokens=count_tokens(prompt),
        tokens=tokens,
        finish=finish,
    )


def _length_of(limit: int | None, natural: int | None) -> tuple[int, str]:
    if limit is None:
        return (_DEFAULT_TOKENS if natural is None else natural), "stop"
    if natural is None or limit <= natural:
        return limit, "length"
    return natural, "stop"


def word(index: int) -> str:
    """Return the token with that index of every answer."""
    return ("" if index == 0 else " ") + _WORDS[index % len(_WORDS)]


def text_of(job: Job) -> str:
    """Return the whole text of an answer."""
    return "".join(word(index) for index in range(job.tokens))


def usage_of(job: Job) -> Json:
    """Return ``usage`` as an answer in one piece carries it."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
        "completion_tokens": job.completion_tokens,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def stream_usage(job: Job, said: int) -> Json:
    """Return ``usage`` as an event carries it after ``said`` tokens."""
    return {
        "prompt_tokens": job.prompt_tokens,
        "total_tokens": job.prompt_tokens + said,
        "completion_tokens": said,
    }
