"""Where a Redis is and how to enter it, read from a URL."""

from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from attrs import field, frozen

REDIS_SCHEMES = ("redis", "rediss", "unix")


@frozen(kw_only=True)
class RedisAddress:
    """What a Redis URL says. Its text is that URL for people, without user and password.

    :ivar host: the host, empty where ``path`` names a Unix socket.
    :ivar ca: a PEM file of the authorities to trust instead of the system's.
    """

    host: str = ""
    port: int = 6379
    path: str | None = None
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"


def parse_redis_url(url: str) -> RedisAddress:
    """Read ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` (TLS; ``?ca=FILE``) or
    ``unix://[[user]:password@]/path[?db=N]``.

    :raises ValueError: one sentence that says what is wrong and repeats nothing that may be a password.
    """
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
        database = _database(options.get("db", "0"))
        return RedisAddress(path=unquote(parts.path), database=database, username=username, password=password)
    if not parts.hostname:
        raise ValueError("the Redis URL names no host")
    return RedisAddress(
        host=parts.hostname,
        port=6379 if port is None else port,
        database=_database(parts.path.removeprefix("/") or options.get("db", "0")),
        username=username,
        password=password,
        tls=parts.scheme == "rediss",
        ca=Path(options["ca"]) if "ca" in options else None,
    )


_WRONG = (
    "the Redis URL is not of the form redis://[[user]:password@]host[:port][/db] "
    "(in the password, write / ? # @ : and % as %2F %3F %23 %40 %3A and %25)"
)


def _options(parts: SplitResult) -> dict[str, str]:
    """Return the query's options, each of which must be known for the scheme."""
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if not options.keys() <= ({"db", "ca"} if parts.scheme == "rediss" else {"db"}):
        raise ValueError("the Redis URL takes no other options than db=NUMBER and, with rediss://, ca=FILE")
    return options


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError("the database in the Redis URL must be a small number, as in redis://host:6379/0")
    return int(text)
