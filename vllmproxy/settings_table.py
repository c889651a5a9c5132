"""The one table of settings: each with its names, its kind, its default and what ``--help`` says of it."""

from collections.abc import Mapping

from attrs import frozen

from vllmproxy.settings_kinds import (
    AUTHORITIES,
    BUDGET_STATUS,
    COUNT,
    COUNT_OR_ZERO,
    DIRECTORY,
    ENDPOINT,
    FLAG,
    NETWORK,
    OUTAGE,
    PRICES,
    ROUTE_SECONDS,
    SECONDS,
    SECONDS_OR_ZERO,
    SECRET,
    SHARE,
    STORE,
    TEXT,
    UPSTREAM,
    WORKERS,
    Kind,
    one_of,
)


@frozen
class Row:
    """One setting under all its names.

    :ivar name: the option without its dashes, and the name in the file.
    :ivar environment: variables that hold the value itself, the first one first. The option and the file's
        entry of a :data:`SECRET` name a file instead.
    :ivar default: as a user would write it; ``default_note`` describes one that has to be worked out.
    :ivar credential: the systemd credential that is read when nothing else is said.
    """

    name: str
    kind: Kind
    help: str
    environment: tuple[str, ...] = ()
    default: str | None = None
    default_note: str | None = None
    repeatable: bool = False
    credential: str | None = None

    @property
    def field(self) -> str:
        """The name in :class:`Settings`."""
        name = self.name.removesuffix("-file") if self.kind is SECRET else self.name
        return name.replace("-", "_")


_ROWS = (
    Row(
        "upstream",
        UPSTREAM,
        "URL of the vLLM server: http://HOST:PORT, https://HOST or unix:/PATH.",
        ("VLLMPROXY_UPSTREAM", "VLLM_API_BASE", "HOSTED_VLLM_API_BASE"),
        default_note="none; it is needed unless --simulate is given",
    ),
    Row(
        "upstream-key-file",
        SECRET,
        "FILE that holds vLLM's own API key; the variable holds the key itself.",
        ("VLLM_API_KEY",),
    ),
    Row(
        "upstream-ca",
        AUTHORITIES,
        "FILE with the certificates (PEM) of those who may sign that of an https:// upstream, instead of the system's.",
    ),
    Row(
        "listen",
        ENDPOINT,
        "Twisted ENDPOINT to listen on: tcp:, tcp6:, unix:, ssl:, tls: or systemd:. May be repeated "
        "(in the variable: separated by spaces).",
        ("VLLMPROXY_LISTEN",),
        default="tcp:4000:interface=127.0.0.1",
        repeatable=True,
    ),
    Row(
        "workers",
        WORKERS,
        "Processes that share the listeners, one for each core; more than 1 need a Redis as their store.",
        ("VLLMPROXY_WORKERS",),
        default="1",
    ),
    Row(
        "store",
        STORE,
        "Where keys are kept: memory:, sqlite:PATH (in the state directory, unless it begins with /), or Redis: "
        "redis://..., rediss://..., unix://... or redis+sentinel://....",
        ("VLLMPROXY_STORE", "REDIS_URL"),
        default="sqlite:vllmproxy.sqlite",
    ),
    Row(
        "state-directory",
        DIRECTORY,
        "DIRECTORY for what has to outlive a restart.",
        ("STATE_DIRECTORY",),
        default_note="$XDG_STATE_HOME/vllmproxy, or ~/.local/state/vllmproxy",
    ),
    Row(
        "master-key-file",
        SECRET,
        "FILE that holds the master key; the variables hold the key itself. Without one, auth is off. "
        "The systemd credential master-key is used when nothing else is said.",
        ("VLLMPROXY_MASTER_KEY", "LITELLM_MASTER_KEY"),
        credential="master-key",
    ),
    Row(
        "access-log",
        TEXT,
        "FILE for one JSON line per request; - is standard output, which a daemon has not.",
        default="-",
    ),
    Row("open", FLAG, "Let anybody in who can reach it, on any address, when there is no master key."),
    Row("simulate", FLAG, "Start a simulated vLLM beside the proxy, to try it without a GPU."),
    Row(
        "trusted-proxy",
        NETWORK,
        "CIDR whose X-Forwarded-* headers are believed. May be repeated.",
        repeatable=True,
    ),
    Row("open-metrics", FLAG, "Answer GET /metrics without a key from anywhere, not only from loopback."),
    Row(
        "connect-timeout",
        SECONDS,
        "Seconds to look vLLM's name up and connect to it, and as many for TLS.",
        default="5",
    ),
    Row("head-timeout", SECONDS, "Seconds for a client to send a whole request head in.", default="10"),
    Row("idle-timeout", SECONDS, "Seconds a client's connection may stay idle between requests.", default="75"),
    Row("body-timeout", SECONDS, "Seconds a client may send no byte of a body that it announced.", default="60"),
    Row(
        "min-body-rate",
        COUNT_OR_ZERO,
        "Bytes a second of a body that a client has to send, over the body timeout; 0: off.",
        default="100",
    ),
    Row("first-byte-timeout", SECONDS, "Seconds for vLLM to begin its answer in.", default="600"),
    Row(
        "first-byte-timeout-for",
        ROUTE_SECONDS,
        "The same for a route and what is below it: PATH=SECONDS. May be repeated; the longest PATH counts.",
        repeatable=True,
    ),
    Row(
        "between-bytes-timeout",
        SECONDS_OR_ZERO,
        "Seconds vLLM may send no byte of an answer that has begun; 0: off.",
        default="600",
    ),
    Row(
        "total-timeout",
        SECONDS_OR_ZERO,
        "Seconds from the head of a request to the end of its answer; 0: off.",
        default="0",
    ),
    Row(
        "tunnel-idle-timeout",
        SECONDS_OR_ZERO,
        "Seconds a WebSocket may be silent, both ways; 0: off.",
        default="600",
    ),
    Row(
        "upstream-idle-timeout",
        SECONDS,
        "Seconds an idle connection to vLLM is kept for reuse; choose half of what the server keeps it.",
        default="2.5",
    ),
    Row("write-timeout", SECONDS, "Seconds a client, or vLLM, may take no byte of what waits for it.", default="60"),
    Row(
        "max-connections",
        COUNT,
        "Connections from clients at once.",
        default_note="half of the files that may be open, less some, and at most 10000",
    ),
    Row(
        "max-connections-per-client",
        COUNT_OR_ZERO,
        "Connections at once from one address, trusted proxies' aside; 0: any number.",
        default="0",
    ),
    Row(
        "max-requests",
        COUNT_OR_ZERO,
        "Requests under way under /vllm at once; 0: as many as connections.",
        default="0",
    ),
    Row("max-requests-per-client", COUNT_OR_ZERO, "The same for one address; 0: any number.", default="0"),
    Row("max-waiting", COUNT_OR_ZERO, "Requests that wait, in order, where max-requests are under way.", default="100"),
    Row("waiting-timeout", SECONDS, "Seconds a request may wait for that.", default="30"),
    Row("max-head", COUNT, "Bytes the header lines of a request may have.", default="65536"),
    Row("max-headers", COUNT, "Header lines a request may have.", default="128"),
    Row("max-target", COUNT, "Bytes a request target (path and query) may have.", default="16384"),
    Row(
        "max-body",
        COUNT_OR_ZERO,
        "Bytes a request's body may have, announced or in chunks; 0: any number. vLLM has all of it in memory.",
        default="1073741824",
    ),
    Row("max-api-body", COUNT, "Bytes a body sent to the proxy's own API may have.", default="1048576"),
    Row("max-held-api-bodies", COUNT, "Bytes of all such bodies together.", default="33554432"),
    Row(
        "max-inspected-body",
        COUNT,
        "Bytes of a body that is read before it is forwarded, as keys with models, aliases, token limits or a budget "
        "need it.",
        default="33554432",
    ),
    Row("max-held-bodies", COUNT, "Bytes of all such bodies together.", default="536870912"),
    Row("prices", PRICES, "FILE with what models cost, for budgets and spend in money."),
    Row("budget-status", BUDGET_STATUS, "HTTP status of a budget that is used up.", default="422"),
    Row(
        "usage",
        one_of("auto", "exact", "passive"),
        "How the tokens of a stream are known whose client did not ask for them: exact asks vLLM and takes the answer "
        "out again, passive counts events, auto is exact for keys with a token limit or a budget.",
        default="auto",
    ),
    Row("cut-revoked", FLAG, "End what a key has under way when it is deleted or blocked."),
    Row(
        "key-cache-ttl",
        SECONDS_OR_ZERO,
        "Seconds that a key looked up is remembered; 0 asks the store each time.",
        default="1",
    ),
    Row(
        "key-max-stale",
        SECONDS_OR_ZERO,
        "Seconds that a key goes on working after the store last gave it, while the store does not answer; 0: off.",
        default="300",
    ),
    Row(
        "store-outage",
        OUTAGE,
        "What becomes of keys with limits while the store does not answer: closed (503), or local: each proxy "
        "counts a share of the limits by itself.",
        default="closed",
    ),
    Row(
        "local-share",
        SHARE,
        "With --store-outage local, how much of each limit a proxy gives, above 0 and up to 1.",
        default="0.5",
    ),
    Row(
        "drain-delay",
        SECONDS_OR_ZERO,
        "Seconds to go on taking requests when asked to stop, with /health/readiness at 503, so that balancers see it.",
        default="0",
    ),
    Row(
        "drain-timeout",
        SECONDS_OR_ZERO,
        "Seconds that requests under way have to finish in after that, before they are cut off.",
        default="30",
    ),
)

#: Every setting by its name.
TABLE: Mapping[str, Row] = {row.name: row for row in _ROWS}
