"""Which of vLLM's routes take a model, tell usage only when asked, and write how much. The routes are vLLM 0.32's."""

import re
from typing import Final

#: Methods that vLLM reads no body of. Its routes for inference take POST alone and answer all others with 405.
_WITHOUT_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"})
_WITHOUT_MODEL: Final = re.compile(r"/v1/responses/[^/]+/cancel")

#: Routes whose streams tell usage only when asked, and what a body must have one of, or vLLM refuses it.
_STREAMS: Final = {
    "/v1/chat/completions": frozenset({"messages"}),
    "/v1/completions": frozenset({"prompt", "prompt_embeds"}),
    "/invocations": frozenset({"messages", "prompt", "prompt_embeds"}),  # is either, by what is in it
}

#: The fields that bound the output of one answer; the first that is given and not null counts.
_BOUNDS: Final = {
    "/cohere/v2/chat": ("max_tokens",),
    "/inference/v1/generate": ("max_tokens",),
    "/v1/audio/transcriptions": ("max_completion_tokens",),
    "/v1/audio/translations": ("max_completion_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/chat/completions/batch": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}


def takes_model(method: str, path: str) -> bool:
    """Tell whether vLLM reads a ``model`` in the body of such a request, or takes its own where none is given.

    A route that is not known counts as one that does. ``/v1/realtime`` is a GET and names its model in a WebSocket
    message, where nothing here sees it.

    :param path: below the upstream's own path, percent-decoded, as :func:`vllmproxy.keys.routes.plain_path` gives it;
        of a route for inference.
    """
    return method not in _WITHOUT_BODY and not (path.endswith("/cancel") and _WITHOUT_MODEL.fullmatch(path))


def streams_usage(path: str) -> bool:
    """Tell whether a stream of this route tells its usage only when asked, in one event that can be taken out again.

    Responses, Messages and Cohere's chat end every stream with their usage. Transcriptions are asked in a form's
    field, and ``/inference/v1/generate`` is off unless the server has ``--enable-scale-out``: their streams are
    counted.
    """
    return path in _STREAMS


def needed_of(path: str) -> frozenset[str]:
    """Return the members of which a body of a route that :func:`streams_usage` must have one."""
    return _STREAMS.get(path, frozenset())


def bounds_of(path: str) -> tuple[str, ...]:
    """Return the fields that bound the output on this route, the one that vLLM prefers first; none if not known."""
    return _BOUNDS.get(path, ())
