"""What a key opens: its ``key_type`` and ``allowed_routes``, compiled once. Pure."""

from collections.abc import Sequence
from typing import Final

from attrs import frozen

from vllmproxy.keys.routes import Group, group_of, only_prefixes, plain_path, reading_of

#: LiteLLM's kinds of keys, and the groups of vLLM's routes that each opens.
KEY_TYPES: Final[dict[str, frozenset[Group]]] = {
    "default": frozenset({"inference", "info"}),
    "llm_api": frozenset({"inference", "info"}),
    "read_only": frozenset({"info"}),
    "management": frozenset(),
}

#: Names that stand for many routes in ``allowed_routes``, ours and LiteLLM's; its ``management_routes`` are
#: the key API and none of vLLM's.
ROUTE_GROUPS: Final[dict[str, frozenset[Group]]] = {
    "inference": frozenset({"inference"}),
    "info": frozenset({"info"}),
    "admin": frozenset({"admin"}),
    "llm_api_routes": frozenset({"inference", "info"}),
    "info_routes": frozenset({"info"}),
    "management_routes": frozenset(),
}

#: What a key may ask about itself.
READ_ROUTES: Final = frozenset({"/key/info", "/key/list", "/key/aliases", "/key/health", "/usage"})
_KEY_API: Final = ("/key", "/usage")


@frozen
class Route:
    """One path of ``allowed_routes``.

    :ivar text: the path without a trailing slash; with ``wildcard``, what paths begin with.
    :ivar group: what it names by itself. A route that is not known opens only where an entry names it.
    """

    text: str
    wildcard: bool
    group: Group

    def covers(self, path: str) -> bool:
        """Tell whether ``path``, decoded and without a trailing slash, is this route or below it."""
        if self.wildcard:
            return path.startswith(self.text)
        return path == self.text or path.startswith(self.text + "/")


def parse_route(entry: str) -> Route:
    """Return the path ``entry``: exact and all below it, or with a trailing ``*`` all that begins so.

    :raises ValueError: with what is wrong with it.
    """
    wildcard = entry.endswith("*")
    text = entry.removesuffix("*")
    if not text.startswith("/") or "*" in text:
        raise ValueError("a path begins with / and may end with one *")
    if plain_path(text.encode("utf-8", "replace")) != text.removesuffix("/"):
        raise ValueError("a path is written plainly: no %, //, dot segments, query or signs beyond ASCII")
    if not wildcard:
        text = text.removesuffix("/")
    return Route(text, wildcard, _group_named(text, wildcard))


def _group_named(text: str, wildcard: bool) -> Group:
    """Return the group that an entry names; ``inference`` for one that names none, for it then opens nothing more."""
    group = group_of(text.encode() or b"/")
    if group != "unknown":
        return group
    bounded = not wildcard or text.endswith("/")
    return "unknown" if bounded and text.strip("/") and not only_prefixes(text) else "inference"


@frozen
class Policy:
    """What a key may call.

    :ivar groups: the groups of vLLM's routes that are open as a whole.
    :ivar routes: paths that are open besides.
    :ivar within: the groups that ``routes`` may open, which the key's type bounds.
    :ivar manages: the whole key API is open.
    :ivar reads: what may be asked of the key API about the key itself.
    :ivar key_routes: paths of the key API that are open besides.
    """

    groups: frozenset[Group]
    routes: tuple[Route, ...] = ()
    within: frozenset[Group] = frozenset()
    manages: bool = False
    reads: frozenset[str] = frozenset()
    key_routes: tuple[Route, ...] = ()

    def opens(self, group: Group, path: bytes, base: bytes) -> bool:
        """Tell whether a route of vLLM is open.

        :param group: what :func:`~vllmproxy.keys.routes.group_for` says of ``path`` and ``base``.
        :param path: the forwarded path, raw.
        :param base: the path of the upstream's URL, with and without which ``path`` is compared; one of inference and
            info is compared as it is judged, too.
        """
        if group in self.groups:
            return True
        if not self.routes or group not in self.within:
            return False
        readings = {plain_path(path), plain_path(path.removeprefix(base.rstrip(b"/")))}
        if group in ("inference", "info"):
            readings.add(reading_of(path, base))
        return any(self._covers(reading, group) for reading in readings if reading is not None)

    def _covers(self, path: str, group: Group) -> bool:
        """An entry opens admin and unknown routes only if it names such a one, not by reaching over it."""
        if group in ("admin", "unknown"):
            return any(route.group == group and route.covers(path) for route in self.routes)
        return any(route.covers(path) for route in self.routes)

    def may_manage(self, endpoint: str) -> bool:
        """Tell whether the key API's ``endpoint`` (``/key/update``) is open, for any key."""
        return self.manages or any(route.covers(endpoint) for route in self.key_routes)

    def may_read(self, endpoint: str) -> bool:
        """Tell whether ``endpoint`` is open to ask about the key itself."""
        return endpoint in self.reads or self.may_manage(endpoint)

    @property
    def is_elevated(self) -> bool:
        """Whether it opens what only the master key can give: admin and unknown routes, or managing keys."""
        named = any(route.group in self.within and route.group in ("admin", "unknown") for route in self.routes)
        return self.manages or bool(self.key_routes) or "admin" in self.groups or named


def compile_policy(key_type: str, allowed_routes: Sequence[str], *, granted_by_master: bool) -> Policy:
    """Return what a key with these fields opens: what its type and its routes both allow.

    :param granted_by_master: the master key set them; else nothing in them opens admin routes, routes that are
        not known, or the key API for other keys.
    :raises ValueError: a type or a route that is none.
    """
    if key_type not in KEY_TYPES:
        raise ValueError(f"a key_type is one of {', '.join(KEY_TYPES)}")
    by_type = KEY_TYPES[key_type]
    reads = frozenset() if key_type == "llm_api" else READ_ROUTES
    if not allowed_routes:
        return Policy(by_type, manages=granted_by_master and key_type == "management", reads=reads)
    names = frozenset(allowed_routes).intersection(ROUTE_GROUPS)
    paths = [parse_route(entry) for entry in allowed_routes if entry not in ROUTE_GROUPS]
    within: frozenset[Group] = by_type
    if granted_by_master and key_type in ("default", "llm_api"):
        within = within.union({"admin", "unknown"})
    may_manage = granted_by_master and key_type in ("default", "management")
    return Policy(
        within.intersection(group for name in names for group in ROUTE_GROUPS[name]),
        tuple(_forwarded(path) for path in paths if not _is_of_key_api(path)),
        within,
        manages=may_manage and "management_routes" in names,
        reads=reads if "info_routes" in names else frozenset(r for r in reads if any(path.covers(r) for path in paths)),
        key_routes=tuple(path for path in paths if may_manage and _manages(path, key_type)),
    )


def _manages(route: Route, key_type: str) -> bool:
    """Tell whether an entry opens the key API for other keys. ``/key/info`` does so for a key made to manage only."""
    if key_type != "management" and route.text in READ_ROUTES:
        return False
    return _is_of_key_api(route)


def _is_of_key_api(route: Route) -> bool:
    return any(route.text == path or route.text.startswith(path + "/") for path in _KEY_API)


def _forwarded(route: Route) -> Route:
    """Return ``route`` without the ``/vllm`` that LiteLLM's paths begin with and that is not forwarded."""
    if route.text != "/vllm" and not route.text.startswith("/vllm/"):
        return route
    text = route.text.removeprefix("/vllm")
    return Route(text, route.wildcard, _group_named(text, route.wildcard))
