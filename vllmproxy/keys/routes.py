"""Which of vLLM's routes a path is, and who may open it. Pure.

Routes depend on the model's task, on flags and on plugins, so no list is closed: what is not listed here is
``unknown`` and stays shut, except below the prefixes that vLLM keeps for inference. The lists are those of
vLLM 0.32's Python front end.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

Group = Literal["inference", "info", "admin", "unknown"]

#: Segments that vLLM puts in front of inference routes, alone or together (``/inference/v1/generate``).
_PREFIXES: Final = frozenset({"v1", "v2", "inference", "cohere"})

#: First segments after the prefixes, compared in lower case. Looked for below the prefixes too, so that an
#: admin route which vLLM moves below ``/v1`` does not open by itself.
_ADMIN: Final = frozenset(
    {
        "abort_requests",
        "collective_rpc",
        "fault_tolerance",
        "is_paused",
        "is_scaling_elastic_ep",
        "is_sleeping",
        "load_lora_adapter",
        "pause",
        "release_kv_cache_memory",
        "resume",
        "scale_elastic_ep",
        "server_info",
        "sleep",
        "start_profile",
        "stop_profile",
        "unload_lora_adapter",
        "wake_up",
    }
)

_INFO: Final = frozenset(
    {
        "/docs",
        "/health",
        "/kv_event_sources",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/redoc",
        "/tokenizer_info",
        "/v1/models",
        "/version",
    }
)
_INFO_BELOW: Final = ("/v1/models/", "/static/", "/docs/")

_INFERENCE: Final = frozenset(
    {
        "/classify",
        "/detokenize",
        "/generative_scoring",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
    }
)

_ROUTES: Final = (
    *(f"/{name}" for name in _ADMIN - {"load_lora_adapter", "unload_lora_adapter", "fault_tolerance"}),
    "/fault_tolerance/apply",
    "/inference/v1/abort_requests",
    "/reset_prefix_cache",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    *_INFO,
    *_INFERENCE,
    "/inference/v1/generate",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/realtime",
    "/v1/rerank",
    "/v1/responses",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
)

#: Paths that may stand in a metric's label as they are; everything else shares one label.
KNOWN_ROUTES: Final[frozenset[bytes]] = frozenset(route.encode() for route in _ROUTES)

#: What two readers of a path could take differently: a ``%`` without two hex digits and an encoded slash,
#: looked for before decoding, and the rest, looked for after it (a ``%`` still there was encoded twice).
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})|%2[fF]")
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f\\;%?#]|//|/\.{1,2}(?:/|$)")


#: Encoded blanks besides the space, with which a path is none that can be judged.
_BLANK: Final = re.compile(rb"%0[9A-Da-d]")


def group_of(path: bytes) -> Group:
    """Return the group of ``path`` as vLLM will read it: percent-decoded once, as uvicorn does.

    :param path: the forwarded path, raw, without the query. One that cannot be judged is ``unknown``.
    """
    known = _KNOWN_GROUPS.get(path)
    return _judge(path) if known is None else known


def group_for(path: bytes, base: bytes) -> Group:
    """Return the group of ``path`` at an upstream whose URL has the path ``base`` (``b""`` or ``b"/gpu1/v1"``).

    What stands behind that base may take off all of it, its beginning, or nothing, so ``path`` is judged in each of
    these ways: ``admin`` if any is, else the first that is known, without the whole base, then with more and more.
    """
    groups = [group_of(reading) for reading in _readings(path, base)]
    if "admin" in groups:
        return "admin"
    return next((group for group in groups if group != "unknown"), "unknown")


def reading_of(path: bytes, base: bytes) -> str:
    """Return ``path`` as the server behind ``base`` reads it, decoded, ``""`` where nobody can: the first reading that
    :func:`group_for` knows."""
    readings = list(_readings(path, base))
    known = next((reading for reading in readings if group_of(reading) != "unknown"), readings[-1])
    return plain_path(known) or ""


def _readings(path: bytes, base: bytes) -> Iterator[bytes]:
    cut = base.rstrip(b"/")
    while cut:
        if path.startswith(cut + b"/"):
            yield path[len(cut) :]
        cut = cut.rpartition(b"/")[0]
    yield path


def is_anthropic(path: bytes) -> bool:
    """Tell whether ``path`` is ``/v1/messages`` or below it, where errors take Anthropic's shape."""
    text = plain_path(path)
    return text is not None and (text == "/v1/messages" or text.startswith("/v1/messages/"))


def plain_path(path: bytes) -> str | None:
    """Return ``path`` decoded once and without its trailing slash, ``None`` where two readers could differ."""
    if not path.startswith(b"/") or not path.isascii() or _BAD_ESCAPE.search(path):
        return None
    try:
        text = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return None
    return None if _UNSAFE.search(text) else text.removesuffix("/")


def only_prefixes(text: str) -> bool:
    """Tell whether ``text`` is nothing but what stands in front of inference routes: ``/v1``, ``/inference/v1``."""
    return all(segment in _PREFIXES for segment in text.strip("/").split("/"))


def _judge(path: bytes) -> Group:
    text = plain_path(_BLANK.sub(b"%20", path))
    if text is not None and _is_admin(text.lower()):
        return "admin"
    text = plain_path(path)
    if text is None:
        return "unknown"
    if text in _INFO or text.startswith(_INFO_BELOW):
        return "info"
    first, below, _ = text[1:].partition("/")
    return "inference" if text in _INFERENCE or (below and first in _PREFIXES) else "unknown"


def _is_admin(text: str) -> bool:
    """Tell whether a path is an admin route's, or would be for a reader who takes no notice of blanks."""
    segments = "".join(text.split()).split("/")
    first = next((segment for segment in segments if segment and segment not in _PREFIXES), "")
    return first in _ADMIN or first.startswith(("adapters", "reset_")) or "weight" in first


_KNOWN_GROUPS: Final[dict[bytes, Group]] = {route: _judge(route) for route in KNOWN_ROUTES}
