"""Which path at the upstream a request's target means, and what an upstream's ``Location`` means here. Pure, on bytes.

What is forwarded is what was sent: nothing is decoded and encoded again. What could be read in two ways is refused.
"""

import re

#: Under it every path is vLLM's.
PREFIX = b"/vllm"

#: First segments of OpenAI's and Anthropic's paths, which vLLM serves under ``/v1`` only.
_BARE = frozenset([b"chat", b"completions", b"responses", b"messages", b"embeddings", b"models", b"audio", b"realtime"])

#: Ways to write a path that a router, a cache or vLLM may read as another path (RFC 3986 §3.3, §5.2.4).
_UNSAFE = re.compile(rb"%2[fF]|%5[cC]|%00|//|;|\\|/(?:\.|%2[eE]){1,2}(?:/|\Z)")


def is_under_prefix(target: bytes) -> bool:
    """Whether ``target`` (origin-form) belongs to vLLM."""
    return target.startswith(PREFIX) and (len(target) == len(PREFIX) or target[len(PREFIX)] in b"/?")


def split_target(target: bytes) -> tuple[bytes, bytes]:
    """Return the path and the query, the latter with its ``?``, or empty."""
    path, mark, query = target.partition(b"?")
    return path, mark + query


def is_unsafe(path: bytes) -> bool:
    """Whether a path has dot segments, raw or encoded, ``//``, ``;``, a backslash, ``%2f``, ``%5c`` or ``%00``."""
    return _UNSAFE.search(path) is not None


def upstream_path(path: bytes, base: bytes) -> bytes:
    """Return the path to ask the upstream for.

    :param path: under :data:`PREFIX`, which is taken off.
    :param base: the path of the upstream's URL, ``b""`` for none; it goes in front. Where there is none, OpenAI's and
        Anthropic's bare paths get the ``/v1`` that their SDKs' base URLs would have.
    """
    rest = path[len(PREFIX) :] or b"/"
    if base:
        return base + rest
    if rest.split(b"/", 2)[1] in _BARE:
        return b"/v1" + rest
    return rest


def local_location(location: bytes, authority: bytes, base: bytes) -> bytes:
    """Return an upstream's ``Location`` as the client has to follow it.

    A path, or a URL that names the upstream (whatever its scheme: vLLM builds it from ``Host`` and
    ``X-Forwarded-Proto``), comes to lie under :data:`PREFIX`; any other URL, and a relative reference, stays.
    """
    absolute = re.match(rb"(?i:(https?):)?//([^/?#]*)(.*)\Z", location, re.DOTALL)
    if absolute is not None:
        scheme, named, rest = absolute.groups()
        port = b":443" if (scheme or b"").lower() == b"https" else b":80"
        if named.lower() not in (authority.lower(), authority.lower() + port):
            return location
        location = rest
        if not location.startswith(b"/"):
            location = b"/" + location
    elif not location.startswith(b"/"):
        return location
    if base and (location == base or location.startswith((base + b"/", base + b"?"))):
        location = location[len(base) :]
    return PREFIX + location
