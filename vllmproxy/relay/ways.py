"""Where a request is going, as far as its method and its path tell: worked out once for each path, not each request."""

from functools import lru_cache
from typing import Final

from attrs import frozen

from vllmproxy.inspection.routes import streams_usage, takes_model
from vllmproxy.keys.routes import Group, group_for, reading_of
from vllmproxy.relay.demand import Work, work_of
from vllmproxy.relay.targets import is_unsafe, upstream_path

#: Ways that are remembered, and the longest path of them: callers choose their paths.
_REMEMBERED: Final = 1024
_LONGEST: Final = 256


@frozen
class Way:
    """What a method and a path mean.

    :ivar path: as it is forwarded, raw, without the query.
    :ivar text: what records call it: ``route`` where vLLM is known to have such, else ``path``.
    :ivar is_unsafe: it could be read as another path (:func:`~vllmproxy.relay.targets.is_unsafe`).
    :ivar route: the path as vLLM reads it.
    :ivar work: what vLLM does with tokens there.
    :ivar uses_tokens: vLLM may read or make tokens for it; a route that is not known may.
    :ivar streams_usage: a stream of it can be asked to tell its usage.
    :ivar tells_usage: an answer without any usage has left something out.
    """

    path: bytes
    text: str
    is_unsafe: bool
    group: Group
    route: str
    work: Work
    uses_tokens: bool
    streams_usage: bool
    tells_usage: bool


def way_of(method: bytes, path: bytes, base: bytes) -> Way:
    """Return the way of a request.

    :param path: as it was asked for, under ``/vllm``, without the query.
    :param base: the path of the upstream's URL.
    """
    return _remembered(method, path, base) if len(path) <= _LONGEST else _way_of(method, path, base)


def _way_of(method: bytes, path: bytes, base: bytes) -> Way:
    forwarded = upstream_path(path, base)
    group = group_for(forwarded, base)
    route = reading_of(forwarded, base)
    work = work_of(route)
    uses_tokens = group in ("inference", "unknown") and takes_model(method.decode("ascii"), route)
    return Way(
        forwarded,
        forwarded.decode("ascii") if group == "unknown" or not route else route,
        is_unsafe(path),
        group,
        route,
        work,
        uses_tokens,
        streams_usage(route),
        uses_tokens and work != "counts",
    )


_remembered = lru_cache(maxsize=_REMEMBERED)(_way_of)
