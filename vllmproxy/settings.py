"""The proxy's settings as one frozen value, made out of options, environment and a TOML file.

What is said on the command line counts before the environment, the environment before the file, the file
before the default; an empty variable counts as unset. The names are those of :mod:`vllmproxy.settings_table`.
"""

import re
import tomllib
from collections.abc import Callable, Mapping
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

from attrs import field, frozen

from vllmproxy.authorities import Authorities
from vllmproxy.keys.policy import Route
from vllmproxy.near import nearest
from vllmproxy.settings_kinds import AUTHORITIES, DIRECTORY, FLAG, PRICES, SECRET
from vllmproxy.settings_table import TABLE, Row
from vllmproxy.store.address import REDIS_SCHEMES
from vllmproxy.upstreams.upstream import Upstream
from vllmproxy.usage.prices import Prices
from vllmproxy.usage.reader import UsageMode

ReadFile = Callable[[Path], str]
T = TypeVar("T")

#: What Python neither reads nor writes in decimal.
_TOO_LONG = "a number of thousands of digits"


class SettingsError(Exception):
    """A setting is wrong or missing; its text is one sentence that says which, why, and what to do."""


@frozen(repr=False)
class Secret:
    """A credential that shows itself only when asked to."""

    _value: str

    def reveal(self) -> str:
        """Return the credential: visible ASCII, at least one character."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(...)"


@frozen(kw_only=True)
class Settings:
    """What the proxy runs with. Timeouts are in seconds, ``max_*`` in bytes unless they say otherwise.

    :ivar upstream: ``None`` exactly when ``simulate`` is set.
    :ivar listen: at least one Twisted endpoint description.
    :ivar workers: processes; where there are more than one, the store is a Redis.
    :ivar store: ``memory:``, ``sqlite:PATH``, relative to ``state_directory``, or a Redis URL; not in the ``repr``, for
        it may hold a password.
    :ivar access_log: a file's name, ``-`` for standard output.
    :ivar head_timeout: for a whole request head, from its first byte; ``idle_timeout``: between requests.
    :ivar first_byte_timeout: from the request's last byte to the first of vLLM's answer.
    :ivar min_body_rate: bytes a second, over ``body_timeout``.
    :ivar total_timeout: 0 for none, as for ``between_bytes_timeout`` and ``tunnel_idle_timeout``.
    :ivar max_connections: ``None`` for as many as the open files allow.
    :ivar max_requests: 0 for as many as connections; the two ``per_client`` are off at 0.
    :ivar max_headers: the number of header lines.
    :ivar store_outage: ``closed`` or ``local``.
    :ivar local_share: above 0, up to 1.
    :ivar drain_delay: between not being ready any more and taking no more; ``drain_timeout``: from then on.
    """

    upstream: Upstream | None
    upstream_key: Secret | None
    upstream_ca: Authorities | None
    listen: tuple[str, ...]
    workers: int
    store: str = field(repr=False)
    state_directory: Path
    master_key: Secret | None
    access_log: str
    open: bool
    simulate: bool
    trusted_proxy: tuple[IPv4Network | IPv6Network, ...]
    open_metrics: bool
    connect_timeout: float
    head_timeout: float
    idle_timeout: float
    body_timeout: float
    min_body_rate: int
    first_byte_timeout: float
    first_byte_timeout_for: tuple[tuple[Route, float], ...]
    between_bytes_timeout: float
    total_timeout: float
    tunnel_idle_timeout: float
    upstream_idle_timeout: float
    write_timeout: float
    max_connections: int | None
    max_connections_per_client: int
    max_requests: int
    max_requests_per_client: int
    max_waiting: int
    waiting_timeout: float
    max_head: int
    max_headers: int
    max_target: int
    max_body: int
    max_api_body: int
    max_held_api_bodies: int
    max_inspected_body: int
    max_held_bodies: int
    prices: Prices | None
    budget_status: int
    usage: UsageMode
    cut_revoked: bool
    key_cache_ttl: float
    key_max_stale: float
    store_outage: str
    local_share: float
    drain_delay: float
    drain_timeout: float

    @property
    def kept_master_key(self) -> Path:
        """The file in which ``--simulate`` keeps a master key that it made."""
        return self.state_directory / "master-key"


class _Level(IntEnum):
    OPTION, ENVIRONMENT, FILE, DEFAULT = range(4)


@frozen
class _Found:
    """What was said of a setting: its texts, where (as the user knows the place), and how directly."""

    texts: tuple[str, ...]
    place: str
    level: _Level


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file."""
    return path.read_text(encoding="utf-8")


def load(options: Mapping[str, object], environ: Mapping[str, str], read_file: ReadFile = read_text) -> Settings:
    """Make the settings out of all that was said.

    :param options: what the command line gave: ``True`` for a flag, a list of texts for a repeatable option,
        a text for any other; ``config`` is the file to read. Options not given are absent.
    :param read_file: reads the config file and the secrets' files; may raise ``OSError`` or ``ValueError``.
    :raises SettingsError: at the first mistake.
    """
    config = options.get("config")
    in_file = {} if config is None else _config(Path(str(config)), read_file)
    found = {row.name: _find(row, options, environ, in_file, str(config)) for row in TABLE.values()}
    _choose_upstream(found)
    values: dict[str, Any] = {}
    for row in TABLE.values():
        said = found[row.name]
        if row.kind is SECRET:
            values[row.field] = _secret(row, said, environ, read_file)
        elif row.kind is PRICES:
            values[row.field] = None if said is None else _parsed(row, said, read_file, Prices.parse)
        elif row.kind is AUTHORITIES:
            values[row.field] = None if said is None else _parsed(row, said, read_file, Authorities.parse)
        elif row.name != "state-directory" or said is not None:
            values[row.field] = _value(row, said)
    if "state_directory" not in values:
        values["state_directory"] = _default_state_directory(environ)
    settings = Settings(**values)
    if settings.workers > 1 and (said := found["workers"]) is not None:
        _check_workers(settings, said.place)
    return settings


def _check_workers(settings: Settings, place: str) -> None:
    """Refuse what works in one process only."""
    kind = settings.store.partition(":")[0]
    if kind not in REDIS_SCHEMES:
        raise SettingsError(
            f"{place}: {settings.workers} processes need a store that they share, and {kind}: is one process's; "
            "name a Redis (--store redis://HOST), or leave it at 1"
        )
    if settings.simulate:
        raise SettingsError(
            f"{place}: --simulate is for trying out, in one process; leave it at 1, or start twistd vllmsim and "
            "name it with --upstream"
        )


def _config(path: Path, read_file: ReadFile) -> dict[str, Any]:
    text = _read(path, "--config", read_file)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config: {str(path)!r} is not TOML: {error}; mend that place") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"--config: {str(path)!r} nests too deeply, or has {_TOO_LONG}; mend that place") from None
    for key in table:
        if key not in TABLE:
            near = nearest(key, TABLE)
            hint = f"did you mean {near!r}?" if near else "use the options' names, without dashes in front"
            raise SettingsError(f"--config: {str(path)!r} sets {key!r}, which does not exist; {hint}")
    return table


def _find(
    row: Row,
    options: Mapping[str, object],
    environ: Mapping[str, str],
    in_file: Mapping[str, Any],
    file_name: str,
) -> _Found | None:
    given = options.get(row.name)
    if given is not None:
        return _Found(_texts(given), f"--{row.name}", _Level.OPTION)
    for variable in row.environment:
        text = environ.get(variable, "")
        if text.strip():
            texts = tuple(text.split()) if row.repeatable else (_first(row, text),)
            return _Found(texts, f"environment variable {variable}", _Level.ENVIRONMENT)
    if row.name in in_file:
        place = f"{row.name} in {file_name!r}"
        texts = _from_toml(row, in_file[row.name], place)
        if texts:
            return _Found(texts, place, _Level.FILE)
    return None if row.default is None else _Found((row.default,), "default", _Level.DEFAULT)


def _first(row: Row, text: str) -> str:
    """Take the first of several directories: systemd joins them by colons (systemd.exec(5))."""
    return text.partition(":")[0] if row.kind is DIRECTORY else text


def _from_toml(row: Row, value: object, place: str) -> tuple[str, ...]:
    items = value if row.repeatable and isinstance(value, list) else [value]
    if any(type(item) not in row.kind.toml for item in items):  # exact: a bool is an int to isinstance
        raise SettingsError(f"{place}: this has to be {row.kind.called}; change it there")
    try:
        return _texts(items)
    except ValueError:
        raise SettingsError(f"{place}: this is {_TOO_LONG}; change it there") from None


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in items)


def _value(row: Row, found: _Found | None) -> Any:
    if found is None:
        return () if row.repeatable else False if row.kind is FLAG else None
    try:
        values = tuple(row.kind.convert(text) for text in found.texts)
    except ValueError as error:
        raise SettingsError(f"{found.place}: {error}") from None
    return values if row.repeatable else values[0]


def _choose_upstream(found: dict[str, _Found | None]) -> None:
    """Leave either an upstream or the simulator: the one that was said more directly."""
    upstream, simulate = found["upstream"], found["simulate"]
    if simulate is not None and simulate.texts == ("false",):
        simulate = None
    if upstream is None and simulate is None:
        *first, last = TABLE["upstream"].environment
        raise SettingsError(
            f"no vLLM server is named: give --upstream URL (or set {', '.join(first)} or {last}), "
            "or try it out with --simulate"
        )
    if upstream is not None and simulate is not None:
        if upstream.level == simulate.level:
            raise SettingsError(f"{simulate.place}: it stands for an upstream; leave it or {upstream.place} out")
        found["upstream" if simulate.level < upstream.level else "simulate"] = None


def _secret(row: Row, found: _Found | None, environ: Mapping[str, str], read_file: ReadFile) -> Secret | None:
    if found is None:
        return _credential(row, environ, read_file)
    if found.level is _Level.ENVIRONMENT:
        return checked_secret(found.texts[0], found.place)
    path = Path(_value(row, found))
    return checked_secret(_read(path, found.place, read_file), f"{found.place}: {str(path)!r}")


def _parsed(row: Row, found: _Found, read_file: ReadFile, parse: Callable[[str], T]) -> T:
    path = Path(_value(row, found))
    try:
        return parse(_read(path, found.place, read_file))
    except ValueError as error:
        raise SettingsError(f"{found.place}: {str(path)!r}: {error}") from None


def _credential(row: Row, environ: Mapping[str, str], read_file: ReadFile) -> Secret | None:
    """Read what systemd's ``LoadCredential=`` left, if it left anything (systemd.exec(5), CREDENTIALS)."""
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if row.credential is None or not directory:
        return None
    path, place = Path(directory, row.credential), f"systemd credential {row.credential}"
    try:
        text = read_file(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, place, error) from None
    return checked_secret(text, place)


def checked_secret(text: str, place: str) -> Secret:
    """Return the credential that ``text`` holds. Raises :class:`SettingsError`, naming ``place``."""
    secret = text.rstrip("\r\n")
    if not secret:
        raise SettingsError(f"{place}: the key is empty; put one there or leave the setting out")
    if not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise SettingsError(f"{place}: the key has to be one line of visible ASCII without spaces; write a new one")
    return Secret(secret)


def _read(path: Path, place: str, read_file: ReadFile) -> str:
    try:
        return read_file(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, place, error) from None


def _unreadable(path: Path, place: str, error: OSError | ValueError) -> SettingsError:
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return SettingsError(f"{place}: cannot read {str(path)!r} ({why}); check its name and who may read it")


def _default_state_directory(environ: Mapping[str, str]) -> Path:
    state_home, home = environ.get("XDG_STATE_HOME", ""), environ.get("HOME", "")
    if state_home.startswith("/"):  # the XDG base directory specification has relative ones ignored
        return Path(state_home, "vllmproxy")
    if not home:
        raise SettingsError("no place for the state is known: give --state-directory, or set STATE_DIRECTORY or HOME")
    return Path(home, ".local/state/vllmproxy")
