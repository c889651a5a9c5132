"""Where a Redis is and how to enter it, read from a URL."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from attrs import evolve, field, frozen

_SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
REDIS_SCHEMES = ("redis", "rediss", "unix", *_SENTINEL_SCHEMES)


@frozen(kw_only=True)
class RedisAddress:
    """What a Redis URL says. Its text is that URL for people, without user and password.

    :ivar host: the host, empty where ``path`` names a Unix socket.
    :ivar ca: a PEM file of the authorities to trust instead of the system's.
    :ivar sentinels: hosts and ports of those who know where the master is; ``host`` is empty then.
    :ivar service: what they call that master.
    """

    host: str = ""
    port: int = 6379
    path: str | None = None
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: Path | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.database}"
        scheme = "rediss" if self.tls else "redis"
        if self.sentinels:
            places = ",".join(place(*sentinel) for sentinel in self.sentinels)
            return f"{scheme}+sentinel://{places}/{self.service}/{self.database}"
        return f"{scheme}://{place(self.host, self.port)}/{self.database}"

    def at(self, host: str, port: int) -> "RedisAddress":
        """Return the address of one server, a master or a sentinel, of those that this one means."""
        return evolve(self, host=host, port=port, sentinels=(), service="")


def place(host: str, port: int) -> str:
    """Return how people write a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_redis_url(url: str) -> RedisAddress:
    """Read ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` (TLS; ``?ca=FILE``),
    ``unix://[[user]:password@]/path[?db=N]`` or ``redis+sentinel://[[user]:password@]host[:port],…/NAME[/db]``
    (``rediss+sentinel://``).

    :raises ValueError: one sentence that says what is wrong and repeats nothing that may be a password.
    """
    url, others = _first_host(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(_WRONG) from None
    after_login = url.partition("://")[2].removeprefix(parts.netloc)
    if parts.scheme not in REDIS_SCHEMES or parts.fragment or "@" in after_login:
        raise ValueError(_WRONG)
    options = _options(parts)
    username, password = unquote(parts.username or "") or None, unquote(parts.password or "") or None
    if username and password is None:
        raise ValueError("the Redis URL has a user and no password: without a user, write redis://:PASSWORD@host")
    if parts.scheme == "unix":
        if parts.hostname or len(parts.path) < 2:
            raise ValueError("the URL of a Unix socket has three slashes, as in unix:///run/redis/redis.sock")
        number = _database(options.get("db", "0"))
        return RedisAddress(path=unquote(parts.path), database=number, username=username, password=password)
    if not parts.hostname:
        raise ValueError("the Redis URL names no host")
    where: dict[str, Any] = {"host": parts.hostname, "port": 6379 if port is None else port}
    database = parts.path.removeprefix("/")
    if parts.scheme in _SENTINEL_SCHEMES:
        service, _, database = database.partition("/")
        where = _sentinels((parts.hostname, _SENTINEL_PORT if port is None else port), others, service)
    return RedisAddress(
        **where,
        database=_database(database or options.get("db", "0")),
        username=username,
        password=password,
        tls=parts.scheme.startswith("rediss"),
        ca=Path(options["ca"]) if "ca" in options else None,
    )


_WRONG = (
    "the Redis URL is not of the form redis://[[user]:password@]host[:port][/db] "
    "(in the password, write / ? # @ : and % as %2F %3F %23 %40 %3A and %25)"
)

_SENTINEL_PORT = 26379


def _first_host(url: str) -> tuple[str, list[str]]:
    """Return the URL with the first of its hosts only, where it may have several, and the others."""
    scheme, separator, rest = url.partition("://")
    if scheme not in _SENTINEL_SCHEMES:
        return url, []
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    login, at, hosts = authority.rpartition("@")
    first, *others = hosts.split(",")
    return f"{scheme}{separator}{login}{at}{first}{rest.removeprefix(authority)}", others


def _sentinels(first: tuple[str, int], others: list[str], service: str) -> dict[str, Any]:
    if not service:
        raise ValueError("the Sentinel URL names no master, as in redis+sentinel://host1,host2/mymaster")
    return {"sentinels": (first, *map(_sentinel, others)), "service": unquote(service)}


def _sentinel(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        raise ValueError(_WRONG_SENTINEL) from None
    if not parts.hostname:
        raise ValueError(_WRONG_SENTINEL)
    return parts.hostname, _SENTINEL_PORT if port is None else port


_WRONG_SENTINEL = "the sentinels in the Redis URL are not of the form host1[:port],host2[:port]"


def _options(parts: SplitResult) -> dict[str, str]:
    """Return the query's options, each of which must be known for the scheme."""
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not options.keys() <= ({"db", "ca"} if parts.scheme.startswith("rediss") else {"db"}):
        raise ValueError("the Redis URL takes no other options than db=NUMBER and, with rediss://, ca=FILE")
    return options


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError("the database in the Redis URL must be a small number, as in redis://host:6379/0")
    return int(text)
