"""What a setting may hold, and how that is read from text: a sentence says what is wrong, and how to write it."""

import math
import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from attrs import frozen
from twisted.internet.endpoints import serverFromString

from vllmproxy.keys.policy import Route, parse_route
from vllmproxy.store.address import REDIS_SCHEMES, parse_redis_url
from vllmproxy.upstreams.upstream import Upstream

#: So that a slip of the finger does not start a million processes.
MOST_WORKERS = 256
#: Of any time but 0, in seconds: less is a slip of the finger, too, and meets what it is to wait for in no case.
SHORTEST = 0.001

_ENDPOINT_TYPES = ("tcp", "tcp6", "unix", "ssl", "tls", "systemd")


def _filled(text: str) -> str:
    if not text:
        raise ValueError("the name is empty; give one or leave the setting out")
    return text


def _endpoint(text: str) -> str:
    kind = text.partition(":")[0]
    if kind not in _ENDPOINT_TYPES or ":" not in text:
        raise ValueError(f"{text!r} is no endpoint; begin with one of {', '.join(_ENDPOINT_TYPES)} and a colon")
    if kind in {"tcp", "tcp6", "unix"}:  # building the others reads certificates or takes over descriptors
        try:
            serverFromString(None, text)
        except (ValueError, TypeError, RuntimeError):  # RuntimeError: a backslash at the end
            raise ValueError(
                f"{text!r} is no endpoint Twisted understands; write it like tcp:4000:interface=127.0.0.1 "
                "or unix:/run/vllmproxy.sock, with a backslash before each colon of an IPv6 address"
            ) from None
    port = re.search(r"(?:^(?:tcp6?|ssl):|:port=)(-?\d+)(?=:|$)", text)
    if port and not 0 <= int(port[1]) <= 65535:
        raise ValueError(f"{text!r} names port {port[1]}; choose one from 0 (any that is free) to 65535")
    return text


def _store(text: str) -> str:
    scheme, _, rest = text.partition(":")
    if scheme in REDIS_SCHEMES:
        parse_redis_url(text)
    elif text != "memory:" and (scheme != "sqlite" or not rest):  # not repeated: it may hold a password
        raise ValueError(
            "no such store; it is memory:, sqlite:PATH, redis://HOST, rediss://HOST, unix:///SOCKET or "
            "redis+sentinel://HOST/NAME"
        )
    return text


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}; write a network like 10.0.0.0/8 or 2001:db8::/32") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None:  # peers are compared by the address they really have
        return IPv4Network((mapped, max(network.prefixlen - 96, 0)))
    return network


def _number(text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {wanted}") from None


def _seconds(text: str) -> float:
    seconds = _seconds_or_zero(text)
    if seconds == 0:
        raise ValueError(f"0 seconds is too short for anything; give {SHORTEST} or more")
    return seconds


def _seconds_or_zero(text: str) -> float:
    seconds = _number(text, "a number of seconds; write it like 10 or 0.5")
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{text} is no length of time; give seconds as a number above 0")
    if 0 < seconds < SHORTEST:
        raise ValueError(f"{text} seconds is too short for anything; give {SHORTEST} or more")
    return seconds


def _route_seconds(text: str) -> tuple[Route, float]:
    path, mark, seconds = text.rpartition("=")
    if not mark:
        raise ValueError(f"{text!r} is no route with its seconds; write it like /v1/embeddings=30")
    try:
        route = parse_route(path.removeprefix("/vllm"))
    except ValueError as error:
        raise ValueError(f"{path!r} is no route: {error}") from None
    return route, _seconds(seconds)


def one_of(*choices: str) -> "Kind":
    def choose(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}; choose one of them")
        return text

    return Kind((str,), f"one of {', '.join(choices)}", choose)


def _budget_status(text: str) -> int:
    if text not in ("400", "402", "403", "422", "429"):
        raise ValueError(f"{text!r} is no status for a budget that is used up; choose 400, 402, 403, 422 or 429")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number from 1 up; write it like 1024")
    return int(text)


def _count_or_zero(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _workers(text: str) -> int:
    count = _count(text)
    if count > MOST_WORKERS:
        raise ValueError(f"{text} processes are more than {MOST_WORKERS}; choose one for each core")
    return count


def _share(text: str) -> float:
    share = _number(text, "a number; write it like 0.5")
    if not 0 < share <= 1:
        raise ValueError(f"{text} is no share; give a number above 0 and up to 1")
    return share


@frozen
class Kind:
    """What a setting holds: the TOML types it may have, how to call them, and the converter from text."""

    toml: tuple[type, ...]
    called: str
    convert: Callable[[str], Any]


FLAG = Kind((bool,), "true or false", lambda text: text == "true")
TEXT = Kind((str,), "a string", _filled)
SECRET = Kind((str,), "a string (the file's name)", _filled)
DIRECTORY = Kind((str,), "a string", lambda text: Path(_filled(text)))
UPSTREAM = Kind((str,), "a string", Upstream.parse)
ENDPOINT = Kind((str,), "a string or a list of strings", _endpoint)
STORE = Kind((str,), "a string", _store)
NETWORK = Kind((str,), "a string or a list of strings", _network)
SECONDS = Kind((int, float), "a number", _seconds)
SECONDS_OR_ZERO = Kind((int, float), "a number", _seconds_or_zero)
OUTAGE = one_of("closed", "local")
SHARE = Kind((int, float), "a number", _share)
ROUTE_SECONDS = Kind((str,), "a string or a list of strings", _route_seconds)
COUNT = Kind((int,), "a whole number", _count)
WORKERS = Kind((int,), "a whole number", _workers)
AUTHORITIES = Kind((str,), "a string (the file's name)", _filled)
COUNT_OR_ZERO = Kind((int,), "a whole number", _count_or_zero)
PRICES = Kind((str,), "a string (the file's name)", _filled)
BUDGET_STATUS = Kind((int,), "an HTTP status", _budget_status)
