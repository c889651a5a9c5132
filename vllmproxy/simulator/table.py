"""Every route of the simulated vLLM, and what answers it."""

from collections.abc import Callable

from attrs import frozen

from vllmproxy.simulator import chat, messages, pooling, responses, shapes
from vllmproxy.simulator.config import SimulatorConfig
from vllmproxy.simulator.shapes import Ask, Json, Reply, Whole
from vllmproxy.simulator.stats import Stats

_ADMIN = frozenset(
    (
        "/abort_requests",
        "/adapters",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/inference/v1/abort_requests",
        "/is_paused",
        "/is_scaling_elastic_ep",
        "/is_sleeping",
        "/pause",
        "/release_kv_cache_memory",
        "/resume",
        "/scale_elastic_ep",
        "/server_info",
        "/sleep",
        "/start_profile",
        "/stop_profile",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
    )
)
_BYTES_PER_SECOND = 32000

Answer = Callable[[Ask], Reply]


def is_admin(path: str) -> bool:
    """Whether a path is one that only an operator should reach; a trailing slash makes no difference."""
    path = path.rstrip("/")
    first = path[1:].partition("/")[0]
    return path in _ADMIN or first == "adapters" or first.startswith("reset_") or "weight" in first


@frozen
class Route:
    """What answers a path.

    :ivar methods: the methods it takes.
    :ivar answer: a pure function of the request.
    :ivar takes: ``json``, ``form`` (multipart), or nothing of the body.
    """

    methods: tuple[str, ...]
    answer: Answer
    takes: str = ""


_INVOCATIONS: tuple[tuple[str, Answer], ...] = (
    ("messages", chat.chat),
    ("input", pooling.embeddings),
    ("documents", pooling.rerank),
    ("text_1", pooling.score),
)


def _invocations(ask: Ask) -> Reply:
    """Answer SageMaker's one route by what the body looks like, as vLLM does."""
    for name, answer in _INVOCATIONS:
        if name in ask.body:
            return answer(ask)
    return chat.completion(ask)


def _empty(ask: Ask) -> Reply:
    return Whole(content=b"", content_type=b"")


def _models(ask: Ask) -> Reply:
    model = ask.config.model
    permission: Json = {"id": f"modelperm-{ask.id}", "object": "model_permission", "created": ask.now}
    permission |= {"allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True}
    permission |= {"allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False}
    permission |= {"organization": "*", "group": None, "is_blocking": False}
    card: Json = {"id": model, "object": "model", "created": ask.now, "owned_by": "vllm", "root": model}
    card |= {"parent": None, "max_model_len": shapes.MAX_MODEL_LEN, "permission": [permission]}
    return Whole(content={"object": "list", "data": [card]})


def _transcription(ask: Ask) -> Reply:
    seconds = max(1, -(-ask.length // _BYTES_PER_SECOND))
    return Whole(content={"text": "the quick brown fox", "usage": {"type": "duration", "seconds": seconds}})


def _always(content: Json) -> Answer:
    return lambda ask: Whole(content=content)


_JSON_ROUTES: dict[str, Answer] = {
    "/v1/chat/completions": chat.chat,
    "/v1/completions": chat.completion,
    "/inference/v1/generate": chat.generate,
    "/v1/responses": responses.responses,
    "/v1/messages": messages.messages,
    "/v1/messages/count_tokens": messages.count,
    "/v1/embeddings": pooling.embeddings,
    "/pooling": pooling.pooling,
    "/classify": pooling.classify,
    "/score": pooling.score,
    "/v1/score": pooling.score,
    "/rerank": pooling.rerank,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/tokenize": pooling.tokenize,
    "/detokenize": pooling.detokenize,
    "/invocations": _invocations,
}
#: Answers every administrative path, whatever the method: what matters is that it was reached.
OPERATOR_ROUTE = Route((), _always({}))


def routes(config: SimulatorConfig, stats: Stats) -> dict[str, Route]:
    """Return the routes by their paths; a few of them read or reset ``stats``."""

    def metrics(ask: Ask) -> Reply:
        text = stats.exposition(config.model).encode()
        return Whole(content=text, content_type=b"text/plain; version=1.0.0; charset=utf-8")

    def reset(ask: Ask) -> Reply:
        stats.reset()
        return Whole(content={})

    def openapi(ask: Ask) -> Reply:
        paths: Json = {
            path: {method.lower(): {"responses": {"200": {}}} for method in route.methods}
            for path, route in table.items()
        }
        info = {"title": "FastAPI", "version": "0.1.0"}
        return Whole(content={"openapi": "3.1.0", "info": info, "paths": paths})

    get, post = ("GET",), ("POST",)
    tokenizer = {"tokenizer_class": "Simulated", "model_max_length": shapes.MAX_MODEL_LEN}
    table = {path: Route(post, answer, "json") for path, answer in _JSON_ROUTES.items()}
    table |= {
        "/health": Route(get, _empty),
        "/ping": Route(("GET", "POST"), _empty),
        "/version": Route(get, _always({"version": "0.32.0"})),
        "/load": Route(get, lambda ask: Whole(content={"server_load": stats.running})),
        "/metrics": Route(get, metrics),
        "/kv_event_sources": Route(get, _always({})),
        "/v1/models": Route(get, _models),
        "/tokenizer_info": Route(get, _always(tokenizer)),
        "/openapi.json": Route(get, openapi),
        "/v1/audio/transcriptions": Route(post, _transcription, "form"),
        "/v1/audio/translations": Route(post, _transcription, "form"),
        "/vllmsim/stats": Route(get, lambda ask: Whole(content=stats.as_json())),
        "/vllmsim/reset": Route(post, reset),
    }
    return table
