"""OpenAI's Responses, as vLLM 0.32 answers them: its stream ends in ``response.completed``, with no ``[DONE]``."""

import uuid
from collections.abc import Iterator

from vllmproxy.simulator import shapes
from vllmproxy.simulator.shapes import Ask, Event, Job, Json, Reply, Stream, Whole


def responses(ask: Ask) -> Reply:
    """Answer ``/v1/responses``. Its ids are its own: vLLM does not take ``X-Request-Id`` here."""
    body = ask.body
    shapes.required(body, "input")
    limit = body.get("max_output_tokens")
    prompt = [body.get("instructions"), body["input"]]
    job = shapes.make_job(ask, "", prompt, limit=limit, name="max_output_tokens")
    names = f"resp_{uuid.uuid4().hex[:16]}", f"msg_{uuid.uuid4().hex[:16]}"
    if body.get("stream"):
        return Stream(events=_events(job, body, *names), job=job)
    return Whole(content=_finished(job, body, *names), job=job)


def _part(text: str, logprobs: list[Json] | None) -> Json:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _item(message_id: str, content: list[Json], status: str) -> Json:
    item: Json = {"id": message_id, "content": content, "role": "assistant", "status": status}
    return item | {"type": "message", "phase": None}


def _response(job: Job, body: Json, response_id: str, changes: Json) -> Json:
    """Return the response object as it is before any token, with ``changes`` made to it."""
    content: Json = {
        "id": response_id,
        "created_at": job.created,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": job.model,
        "object": "response",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": body.get("temperature", 1.0),
        "tool_choice": "none",
        "tools": [],
        "top_p": body.get("top_p", 1.0),
        "background": False,
        "max_output_tokens": body.get("max_output_tokens"),
        "service_tier": "auto",
        "status": "in_progress",
        "truncation": "disabled",
        "usage": None,
    }
    nulls = ("max_tool_calls", "previous_response_id", "prompt", "reasoning", "text", "top_logprobs", "user")
    return content | dict.fromkeys(nulls) | changes


def _usage(job: Job) -> Json:
    per_turn: Json = {"input_tokens_per_turn": [], "cached_tokens_per_turn": []}
    details = {"reasoning_tokens": 0, "tool_output_tokens": 0}
    details_per_turn: Json = {"output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0} | per_turn,
        "output_tokens": job.tokens,
        "output_tokens_details": details | details_per_turn,
        "total_tokens": job.prompt_tokens + job.tokens,
    }


def _finished(job: Job, body: Json, response_id: str, message_id: str) -> Json:
    cut = job.finish == "length"
    item = _item(message_id, [_part(shapes.text_of(job), None)], "completed")
    changes: Json = {"output": [item], "usage": _usage(job), "status": "incomplete" if cut else "completed"}
    if cut:
        changes["incomplete_details"] = {"reason": "max_output_tokens"}
    return _response(job, body, response_id, changes)


def _events(job: Job, body: Json, response_id: str, message_id: str) -> Iterator[Event]:
    sequence = iter(range(job.tokens + 9))

    def event(name: str, content: Json, *, waits: bool = False) -> Event:
        numbered = content | {"sequence_number": next(sequence), "type": name}
        return shapes.sse(numbered, name=name, waits=waits)

    started = _response(job, body, response_id, {})
    yield event("response.created", {"response": started})
    yield event("response.in_progress", {"response": started})
    at: Json = {"output_index": 0}
    within = {"content_index": 0, "item_id": message_id} | at
    yield event("response.output_item.added", {"item": _item(message_id, [], "in_progress")} | at, waits=True)
    yield event("response.content_part.added", within | {"part": _part("", [])})
    for index in range(job.tokens):
        delta = within | {"delta": shapes.word(index), "logprobs": []}
        yield event("response.output_text.delta", delta, waits=index > 0)
    text = shapes.text_of(job)
    yield event("response.output_text.done", within | {"logprobs": [], "text": text})
    yield event("response.content_part.done", within | {"part": _part(text, None)})
    item = _item(message_id, [_part(text, None)], "completed")
    yield event("response.output_item.done", {"item": item} | at)
    yield event("response.completed", {"response": _finished(job, body, response_id, message_id)})
