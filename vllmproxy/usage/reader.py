"""Which reader, if any, suits an answer."""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, Protocol

from vllmproxy.usage.jsonbody import JsonReader
from vllmproxy.usage.sse import SseReader
from vllmproxy.usage.tokens import Usage

#: How the tokens of a stream are known whose client did not ask vLLM for them; ``auto``: exactly where a limit or a
#: budget of the key needs them.
UsageMode = Literal["auto", "exact", "passive"]


_EVENT_STREAM: Final = b"text/event-stream"


class UsageReader(Protocol):
    """Shown a passing body, piece by piece, it tells at the end what was used. It never raises.

    The pieces may be of any length: how a body was split makes no difference. What is kept of it is bounded.
    """

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body, after any transfer coding."""

    def finish(self) -> tuple[str | None, Usage | None]:
        """Return the model and the usage, each ``None`` if not told, at the end or a cut."""


class HeadReader:
    """Usage that stands in an answer's head: of embeddings as bytes, in ``metadata`` (vLLM's
    ``build_pooling_bytes_streaming_response``)."""

    def __init__(self, metadata: bytes) -> None:
        self._reader = JsonReader()
        self._reader.feed(metadata)

    def feed(self, data: bytes) -> None:
        """The body is bytes, and tells nothing."""

    def finish(self) -> tuple[str | None, Usage | None]:
        return self._reader.finish()


def is_event_stream(content_type: bytes | None) -> bool:
    """Tell whether an answer with that Content-Type is a stream of events."""
    return content_type is not None and _media_type_of(content_type) == _EVENT_STREAM


def _media_type_of(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def reader_for(
    status: int, content_type: bytes | None, content_encoding: bytes | None, metadata: bytes | None = None
) -> Callable[[], UsageReader] | None:
    """Return what makes a reader for such an answer, or ``None`` if there is nothing in it to be read.

    An answer that failed reports no usage; one with a content coding is passed as it is, and so not read.

    :param content_type: the value of Content-Type, parameters and all.
    :param content_encoding: the value of Content-Encoding.
    :param metadata: the value of vLLM's header of that name.
    """
    if not 200 <= status < 300 or content_type is None:
        return None
    if content_encoding is not None and content_encoding.strip().lower() not in (b"", b"identity"):
        return None
    media_type = _media_type_of(content_type)
    if media_type == _EVENT_STREAM:
        return SseReader
    if media_type == b"application/json" or media_type.endswith(b"+json"):
        return JsonReader
    if media_type == b"application/octet-stream" and metadata is not None:
        return partial(HeadReader, metadata)
    return None
