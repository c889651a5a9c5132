"""Embeddings, pooling, classification, scores and ranks, tokens and their text: answers that are not generated."""

import base64
import struct
from collections.abc import Sequence

from vllmproxy.simulator import shapes
from vllmproxy.simulator.shapes import Ask, Json, Reply, Whole

_DIMENSIONS = 8


def _items(value: object) -> list[object]:
    """Return the separate inputs in a field that takes one or many."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return value
    return [value]


def _usage(tokens: int) -> Json:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0} | {
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def _listing(ask: Ask, prefix: str, data: Sequence[Json], tokens: int) -> Whole:
    model = shapes.check_model(ask)
    head = {"id": f"{prefix}-{ask.id}", "object": "list", "created": ask.now, "model": model}
    return Whole(content=head | {"data": list(data), "usage": _usage(tokens)})


def _vector(value: object) -> list[float]:
    seed = shapes.count_tokens(value) + 1
    return [round(seed / (seed + index + 1), 6) for index in range(_DIMENSIONS)]


def _prompt(ask: Ask) -> object:
    if ask.body.get("input") is None and ask.body.get("messages") is not None:
        return ask.body["messages"]
    shapes.required(ask.body, "input")
    return ask.body["input"]


def embeddings(ask: Ask) -> Reply:
    """Answer ``/v1/embeddings`` as numbers, base64, or bytes with a ``metadata`` header."""
    return _vectors(ask, "embd", "embedding", "embedding")


def pooling(ask: Ask) -> Reply:
    """Answer ``/pooling``, with the same three encodings."""
    return _vectors(ask, "pool", "pooling", "data")


def _vectors(ask: Ask, prefix: str, kind: str, field: str) -> Whole:
    prompt = _prompt(ask)
    encoding = ask.body.get("encoding_format") or "float"
    vectors = [_vector(item) for item in _items(prompt)]
    packed = [struct.pack(f"<{_DIMENSIONS}f", *vector) for vector in vectors]
    if encoding == "base64":
        values: list[object] = [base64.b64encode(data).decode() for data in packed]
    else:
        values = list(vectors)
    data: list[Json] = [{"index": i, "object": kind, field: value} for i, value in enumerate(values)]
    answer = _listing(ask, prefix, data, shapes.count_tokens(prompt))
    if encoding not in ("bytes", "bytes_only"):
        return answer
    return _octets(answer, packed, metadata=encoding == "bytes")


def _octets(answer: Whole, packed: list[bytes], *, metadata: bool) -> Whole:
    content = answer.content
    assert isinstance(content, dict)
    size = 4 * _DIMENSIONS
    places = [
        {"index": i, "embed_dtype": "float32", "endianness": "little"}
        | {"start": i * size, "end": (i + 1) * size, "shape": [_DIMENSIONS]}
        for i in range(len(packed))
    ]
    described = shapes.dumps(content | {"data": places})
    headers = ((b"metadata", described),) if metadata else ()
    return Whole(content=b"".join(packed), headers=headers, content_type=b"application/octet-stream")


def classify(ask: Ask) -> Reply:
    """Answer ``/classify``."""
    prompt = _prompt(ask)
    data = [
        {"index": i, "label": "LABEL_0", "probs": [0.75, 0.25], "num_classes": 2} for i in range(len(_items(prompt)))
    ]
    return _listing(ask, "classify", data, shapes.count_tokens(prompt))


def score(ask: Ask) -> Reply:
    """Answer ``/score``: one text against one or many (``text_1``/``text_2``, or ``queries``/``documents``)."""
    body = ask.body
    left, right = ("queries", "documents") if body.get("queries") is not None else ("text_1", "text_2")
    shapes.required(body, left, right)
    count = max(len(_items(body[left])), len(_items(body[right])))
    data = [{"index": i, "object": "score", "score": _relevance(i)} for i in range(count)]
    return _listing(ask, "score", data, shapes.count_tokens(body[left]) + shapes.count_tokens(body[right]))


def _relevance(index: int) -> float:
    return round(1 / (index + 1), 6)


def rerank(ask: Ask) -> Reply:
    """Answer ``/rerank``: the documents in the order they came, the first as the best."""
    body = ask.body
    shapes.required(body, "query", "documents")
    model = shapes.check_model(ask)
    tokens = shapes.count_tokens(body["query"]) + shapes.count_tokens(body["documents"])
    results = []
    for index, document in enumerate(_items(body["documents"])):
        text = document if isinstance(document, str) else None
        shown = {"text": text, "multi_modal": None if text is not None else [document]}
        results.append({"index": index, "document": shown, "relevance_score": _relevance(index)})
    top = body.get("top_n")
    if isinstance(top, int) and top > 0:
        results = results[:top]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Whole(content={"id": f"rerank-{ask.id}", "model": model, "usage": usage, "results": results})


def tokenize(ask: Ask) -> Reply:
    """Answer ``/tokenize``: a word's token is its number in the prompt, from 0."""
    name = "messages" if ask.body.get("messages") is not None else "prompt"
    shapes.required(ask.body, name)
    shapes.check_model(ask)
    count = shapes.count_tokens(ask.body[name])
    content: Json = {"count": count, "max_model_len": shapes.MAX_MODEL_LEN, "tokens": list(range(count))}
    return Whole(content=content | {"token_strs": None})


def detokenize(ask: Ask) -> Reply:
    """Answer ``/detokenize``: each token becomes the word with that number of every answer."""
    shapes.required(ask.body, "tokens")
    shapes.check_model(ask)
    tokens = ask.body["tokens"] if isinstance(ask.body["tokens"], list) else []
    words = [shapes.word(token) for token in tokens if isinstance(token, int)]
    return Whole(content={"prompt": "".join(words)})
