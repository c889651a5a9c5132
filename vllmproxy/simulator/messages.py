"""Anthropic's Messages, as vLLM 0.32 answers them."""

from collections.abc import Iterator

from vllmproxy.simulator import shapes
from vllmproxy.simulator.shapes import Ask, Event, Job, Json, Reply, Stream, Whole

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


def messages(ask: Ask) -> Reply:
    """Answer ``/v1/messages``; what is refused after validation takes Anthropic's shape."""
    body = ask.body
    shapes.required(body, "model", "messages", "max_tokens")
    try:
        job = shapes.make_job(ask, "chatcmpl-", _prompt(body), limit=body["max_tokens"])
    except shapes.Refusal as refusal:
        raise _anthropic(refusal) from None
    if body.get("stream"):
        return Stream(events=_events(job), job=job)
    content: Json = _message(job) | {"content": [{"type": "text", "text": shapes.text_of(job)}]}
    content |= {"stop_reason": _STOP_REASONS[job.finish], "usage": _usage(job, job.tokens)}
    return Whole(content=content, job=job)


def count(ask: Ask) -> Reply:
    """Answer ``/v1/messages/count_tokens``."""
    shapes.required(ask.body, "model", "messages")
    try:
        shapes.check_model(ask)
    except shapes.Refusal as refusal:
        raise _anthropic(refusal) from None
    tokens = shapes.count_tokens(_prompt(ask.body))
    context = {"original_input_tokens": tokens}
    return Whole(content={"input_tokens": tokens, "context_management": context})


def _anthropic(refusal: shapes.Refusal) -> shapes.Refusal:
    inner = refusal.content["error"]
    content = {"type": "error", "error": {"type": inner["type"], "message": inner["message"]}}
    return shapes.Refusal(refusal.status, content)


def _prompt(body: Json) -> list[object]:
    return [body.get("system"), body["messages"]]


def _usage(job: Job, said: int) -> Json:
    return {"input_tokens": job.prompt_tokens, "output_tokens": said}


def _message(job: Job) -> Json:
    message: Json = {"id": job.id, "type": "message", "role": "assistant", "content": [], "model": job.model}
    return message


def _events(job: Job) -> Iterator[Event]:
    def event(name: str, content: Json, *, waits: bool = False) -> Event:
        return shapes.sse({"type": name} | content, name=name, waits=waits)

    start = {"stop_reason": None, "stop_sequence": None, "usage": _usage(job, 0)}
    yield event("message_start", {"message": _message(job) | start}, waits=True)
    yield event("content_block_start", {"content_block": {"type": "text", "text": ""}, "index": 0})
    for index in range(job.tokens):
        delta = {"type": "text_delta", "text": shapes.word(index)}
        yield event("content_block_delta", {"delta": delta, "index": 0}, waits=index > 0)
    yield event("content_block_stop", {"index": 0})
    end = {"stop_reason": _STOP_REASONS[job.finish], "stop_sequence": None}
    yield event("message_delta", {"delta": end, "usage": _usage(job, job.tokens)})
    yield event("message_stop", {})
