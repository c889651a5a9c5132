"""What a test can ask for with ``X-Vllmsim: directive; name=value; …``, on any path: the table is at the end.

``early=1`` answers at the head of the request instead of after its body. ``ttft``, ``tpot`` (seconds),
``tokens`` and ``comments`` (seconds of silence before a ``: keep-alive``) go with any directive or with none, and
set the pace of a normal answer.
"""

from collections.abc import Callable, Iterator

from attrs import frozen

from vllmproxy.simulator import websocket
from vllmproxy.simulator.exchange import Exchange
from vllmproxy.simulator.shapes import Json, dumps
from vllmproxy.simulator.stream import Pump, Step

_JSON = (b"content-type", b"application/json")
_PERIOD = 251
_CHUNK_LIMIT = 256 * 1024
_PATTERN = bytes(range(_PERIOD)) * (_CHUNK_LIMIT // _PERIOD + 2)


class BadDirective(Exception):
    """The header cannot be understood; the message says why."""


@frozen
class Params:
    """The parameters of a directive, in the order they came; a name may come twice."""

    pairs: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Return every value under that name."""
        return [value for key, value in self.pairs if key == name]

    def text(self, name: str, default: str = "") -> str:
        """Return the first value under that name."""
        return next(iter(self.all(name)), default)

    def integer(self, name: str, default: int = 0) -> int:
        """Return a value as a whole number that is not negative."""
        value = self.text(name, str(default))
        if not (value.isascii() and value.isdigit()):
            raise BadDirective(f"{name} must be a whole number, got {value!r}")
        return int(value)

    def seconds(self, name: str, default: float = 0.0) -> float:
        """Return a value as seconds, between 0 and a day."""
        try:
            value = float(self.text(name, str(default)))
        except ValueError:
            value = -1.0
        if not 0 <= value <= 86400:
            raise BadDirective(f"{name} must be seconds, got {self.text(name)!r}")
        return value


#: Takes the exchange, the parameters, and the normal answer as something to call.
Directive = Callable[[Exchange, Params, Callable[[], None]], None]


def parse(header: str) -> tuple[Directive, Params]:
    """Return the directive that a header names, and its parameters.

    :raises BadDirective: if there is none by that name.
    """
    parts = [part.strip() for part in header.split(";")]
    name = "" if "=" in parts[0] else parts.pop(0)
    if name not in DIRECTIVES:
        raise BadDirective(f"no directive {name!r}; there are {', '.join(filter(None, DIRECTIVES))}")
    pairs = (part.partition("=") for part in parts if part)
    return DIRECTIVES[name], Params(tuple((key.strip(), value.strip()) for key, _, value in pairs))


def pattern(offset: int, length: int) -> bytes:
    """Return ``length`` of the bytes that ``bytes`` sends, from ``offset``: byte *i* is *i* modulo 251."""
    return _PATTERN[offset % _PERIOD : offset % _PERIOD + length]


def _normal(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Nothing but the pace, which the normal answer reads by itself."""
    proceed()


def _echo(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Answer with what was received."""
    request = exchange.request
    content: Json = {
        "method": request.method,
        "target": request.target.decode("latin-1"),
        "http_version": request.version,
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers],
        "body_sha256": None if request.digest is None else request.digest.hexdigest(),
        "body_length": request.length,
        "connection": request.connection,
        "request": request.number,
    }
    exchange.whole(200, dumps(content), [_JSON])


def _die(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Begin the normal answer; FIN after ``after`` bytes of its body."""
    exchange.cut_after(params.integer("after"), exchange.close)
    proceed()


def _reset(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Begin the normal answer; RST after ``after`` bytes of its body."""
    exchange.cut_after(params.integer("after"), exchange.reset)
    proceed()


def _stall(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Begin the normal answer; send nothing more after ``after`` bytes of its body."""
    exchange.cut_after(params.integer("after"), lambda: None)
    proceed()


def _stall_head(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Never answer."""


def _close_before_head(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """FIN without a byte of an answer."""
    exchange.close()


def _reset_before_head(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """RST without a byte of an answer."""
    exchange.reset(at_once=True)


def _short(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Promise ``length`` bytes, send ``sent`` of them, FIN."""
    sent = params.integer("sent", 10)
    exchange.begin(200, [_JSON], length=params.integer("length", 100))
    exchange.write(pattern(0, sent))
    exchange.close()


def _broken_chunk(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Send one good chunk, then one whose size is not a number, then FIN."""
    exchange.begin(200, [_JSON])
    exchange.write(b'{"a good chunk":1,')
    exchange.raw(b"xyz\r\nnot a chunk\r\n")
    exchange.close()


def _garbage(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Answer with what is not HTTP, then FIN."""
    exchange.raw(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    exchange.close()


def _bytes(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Send ``length`` bytes in pieces of ``chunk``, ``delay`` seconds before each; ``chunked`` is 0, 1 or close."""
    length, size = params.integer("length"), params.integer("chunk", 65536)
    framing = params.text("chunked", "0")
    if framing not in ("0", "1", "close") or not 0 < size <= _CHUNK_LIMIT:
        raise BadDirective(f"chunked is 0, 1 or close; chunk is 1 to {_CHUNK_LIMIT}")
    delay = params.seconds("delay")

    def steps() -> Iterator[Step]:
        for offset in range(0, length, size):
            yield delay, pattern(offset, min(size, length - offset))

    exchange.begin(
        params.integer("status", 200),
        [(b"content-type", b"application/octet-stream")],
        length=length if framing == "0" else None,
        close=framing == "close",
    )
    Pump(exchange, steps() if exchange.has_body else ()).start()


def _status(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Answer with ``code``, ``reason``, ``location``, any number of ``set-cookie`` and ``header=name:value``."""
    code = params.integer("code", 200)
    if not 200 <= code <= 999:
        raise BadDirective("code is 200 to 999; see continue for 1xx")
    headers = [(name.encode(), v.encode()) for name in ("location", "set-cookie") for v in params.all(name)]
    for line in params.all("header"):
        name, _, value = line.partition(":")
        headers.append((name.strip().encode(), value.strip().encode()))
    content: Json = {"error": {"message": "As asked for", "type": "Simulated", "param": None, "code": code}}
    reason = params.text("reason").encode() if params.all("reason") else None
    exchange.whole(code, dumps(content if code >= 400 else {}), [_JSON, *headers], reason=reason)


def _headers(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Answer with a ``metadata`` header of ``size`` bytes."""
    exchange.whole(200, b"{}", [_JSON, (b"metadata", b"m" * params.integer("size", 65536))])


def _http10(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Give the normal answer as HTTP/1.0: no framing, the close is the end."""
    exchange.http10 = True
    proceed()


def _continue(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Send an interim answer, ``code`` 100 to 199 (103 unless told), before the normal one."""
    code = params.integer("code", 103)
    if not 100 <= code <= 199 or code == 101:
        raise BadDirective("code is 100 to 199, and not 101")
    exchange.informational(code, [(b"link", b"</style.css>; rel=preload")] if code == 103 else ())
    proceed()


def _gzip(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Compress the normal answer, if it is in one piece."""
    exchange.gzip = True
    proceed()


def _upgrade_refused(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Refuse a WebSocket as vLLM refuses one on a path that has none."""
    websocket.refuse(exchange)


def _raw(exchange: Exchange, params: Params, proceed: Callable[[], None]) -> None:
    """Accept a WebSocket and echo the bytes as they come, frames or not."""
    websocket.accept(exchange, raw=True)


#: Every directive by its name.
DIRECTIVES: dict[str, Directive] = {
    "": _normal,
    "broken-chunk": _broken_chunk,
    "bytes": _bytes,
    "close-before-head": _close_before_head,
    "continue": _continue,
    "die": _die,
    "echo": _echo,
    "garbage": _garbage,
    "gzip": _gzip,
    "headers": _headers,
    "http10": _http10,
    "raw": _raw,
    "reset": _reset,
    "reset-before-head": _reset_before_head,
    "short": _short,
    "stall": _stall,
    "stall-head": _stall_head,
    "status": _status,
    "upgrade-refused": _upgrade_refused,
}
