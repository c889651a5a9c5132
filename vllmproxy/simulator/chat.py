"""Chat completions, completions and token-in-token-out generation, as vLLM 0.32 answers them."""

from collections.abc import Iterator
from typing import Any

from attrs import evolve

from vllmproxy.simulator import shapes
from vllmproxy.simulator.shapes import Ask, Event, Job, Json, Reply, Stream, Whole

_MOST_CHOICES = 128


def chat(ask: Ask) -> Reply:
    """Answer ``/v1/chat/completions``."""
    body = ask.body
    shapes.required(body, "messages")
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    job = shapes.make_job(ask, "chatcmpl-", body["messages"], limit=body.get(name), name=name)
    job = evolve(job, choices=_choices(body))
    if body.get("stream"):
        return Stream(events=_chat_events(job, body), job=job)
    choices = [_chat_choice(job, index) for index in range(job.choices)]
    return Whole(content=_chat_head(job, "chat.completion") | {"choices": choices} | _chat_tail(job), job=job)


def _choices(body: Json) -> int:
    wanted = body.get("n")
    return min(wanted, _MOST_CHOICES) if isinstance(wanted, int) and wanted > 1 else 1


def _chat_head(job: Job, kind: str) -> Json:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _chat_tail(job: Job) -> Json:
    nothing = ("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params")
    return (
        {"service_tier": None, "system_fingerprint": shapes.FINGERPRINT, "usage": shapes.usage_of(job)}
        | dict.fromkeys(nothing)
        | {"ec_transfer_params": None, "metrics": None}
    )


def _chat_choice(job: Job, index: int) -> Json:
    message: Json = {"role": "assistant", "content": shapes.text_of(job)}
    message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": job.finish,
        "stop_reason": None,
        "token_ids": None,
        "routed_experts": None,
    }


def _options(body: Json) -> tuple[bool, bool]:
    options: Any = body.get("stream_options") or {}
    usage = isinstance(options, dict) and bool(options.get("include_usage"))
    return usage, usage and bool(options.get("continuous_usage_stats"))


def _chat_events(job: Job, body: Json) -> Iterator[Event]:
    usage, continuous = _options(body)
    head = _chat_head(job, "chat.completion.chunk")

    def event(choices: list[Json], said: int, *, waits: bool = False, tail: Json | None = None) -> Event:
        counted = shapes.stream_usage(job, said) | {"completion_tokens_details": None}
        count = {"usage": counted} if continuous else {}
        return shapes.sse(head | {"choices": choices} | count | (tail or {}), waits=waits)

    nulls = {"prompt_token_ids": None, "prompt_text": None}
    for choice in range(job.choices):
        delta: Json = {"role": "assistant", "content": ""}
        start = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
        yield event([start], 0, waits=choice == 0, tail=nulls)
    for index in range(job.tokens):
        last = index == job.tokens - 1
        end: Json = {"finish_reason": job.finish, "stop_reason": None} if last else {"finish_reason": None}
        for choice in range(job.choices):
            piece: Json = {"index": choice, "delta": {"content": shapes.word(index)}, "logprobs": None}
            tail = {"system_fingerprint": shapes.FINGERPRINT} if last and not usage else None
            yield event([piece | end | {"token_ids": None}], index + 1, waits=index > 0 and choice == 0, tail=tail)
    yield from _ending(job, head, usage)


def _ending(job: Job, head: Json, usage: bool) -> Iterator[Event]:
    if usage:
        count = {"choices": [], "usage": shapes.stream_usage(job, job.completion_tokens)}
        yield shapes.sse(head | count | {"system_fingerprint": shapes.FINGERPRINT})
    yield shapes.DONE


def completion(ask: Ask) -> Reply:
    """Answer ``/v1/completions``; a list of prompts gives one choice each (times ``n``)."""
    body = ask.body
    prompt = body.get("prompt")
    if not prompt:
        message = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        raise shapes.error(400, "BadRequestError", message, "prompt")
    job = shapes.make_job(ask, "cmpl-", prompt, limit=body.get("max_tokens"))
    job = evolve(job, choices=_choices(body) * len(_prompts(prompt)))
    if body.get("stream"):
        return Stream(events=_completion_events(job, body), job=job)
    nulls = ("token_ids", "prompt_logprobs", "prompt_token_ids", "routed_experts")
    end = {"logprobs": None, "finish_reason": job.finish, "stop_reason": None} | dict.fromkeys(nulls)
    choices = [{"index": index, "text": shapes.text_of(job)} | end for index in range(job.choices)]
    tail = {"service_tier": None, "system_fingerprint": shapes.FINGERPRINT, "usage": shapes.usage_of(job)}
    tail |= dict.fromkeys(("kv_transfer_params", "ec_transfer_params", "metrics"))
    return Whole(content=_chat_head(job, "text_completion") | {"choices": choices} | tail, job=job)


def _prompts(prompt: Any) -> list[Any]:
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _completion_events(job: Job, body: Json) -> Iterator[Event]:
    usage, continuous = _options(body)
    head = _chat_head(job, "text_completion")
    prompts = [shapes.count_tokens(prompt) for prompt in _prompts(body["prompt"])]
    nulls = dict.fromkeys(("stop_reason", "prompt_token_ids", "token_ids"))
    for index in range(job.tokens):
        last = index == job.tokens - 1
        for choice in range(job.choices):
            piece = {"index": choice, "text": shapes.word(index), "logprobs": None}
            content = head | {"choices": [piece | {"finish_reason": job.finish if last else None} | nulls]}
            if continuous:
                prompt = choice * len(prompts) // job.choices
                content["usage"] = shapes.stream_usage(evolve(job, prompt_tokens=prompts[prompt]), index + 1)
            if last and not usage:
                content["system_fingerprint"] = shapes.FINGERPRINT
            yield shapes.sse(content, waits=choice == 0)
    yield from _ending(job, head, usage)


def generate(ask: Ask) -> Reply:
    """Answer ``/inference/v1/generate``: token ids in, token ids out."""
    body = ask.body
    shapes.required(body, "token_ids", "sampling_params")
    sampling = body["sampling_params"]
    limit = sampling.get("max_tokens") if isinstance(sampling, dict) else None
    job = shapes.make_job(ask, "generate-tokens-", body["token_ids"], limit=limit)
    if body.get("stream"):
        return Stream(events=_generate_events(job, body), job=job)
    choice = _generated(list(range(job.tokens)), job.finish)
    content: Json = {"request_id": job.id, "model": job.model, "created": job.created}
    content |= {"usage": shapes.usage_of(job), "output_mode": "tokens", "choices": [choice]}
    return Whole(content=content, job=job)


def _generated(ids: list[int], finish: str | None) -> Json:
    nulls = dict.fromkeys(("stop_reason", "routed_experts", "logprobs"))
    return {"index": 0, "token_ids": ids, "finish_reason": finish} | nulls


def _generate_events(job: Job, body: Json) -> Iterator[Event]:
    usage, continuous = _options(body)
    for index in range(job.tokens):
        finish = job.finish if index == job.tokens - 1 else None
        counted = shapes.stream_usage(job, index + 1) if continuous else None
        content = {"request_id": job.id, "output_mode": "tokens", "usage": counted}
        yield shapes.sse(content | {"choices": [_generated([index], finish)]}, waits=True)
    if usage:
        counted = shapes.stream_usage(job, job.tokens)
        yield shapes.sse({"request_id": job.id, "output_mode": "tokens", "usage": counted, "choices": []})
    yield shapes.DONE
