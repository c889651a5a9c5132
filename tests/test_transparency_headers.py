"""Which request headers reach vLLM: all as sent, but for the hop's own, the caller's credential and a few more."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _service import MASTER_KEY, Twistd, start_proxy, start_simulator
from _wire import ask, echo, new_key, received, request, seen, values, wire

UPSTREAM_KEY = "upstream-secret-0123456789"
SPOOFED = (
    "X-Forwarded-For: 203.0.113.7, 198.51.100.9",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Host: public.example",
    "Via: 1.1 edge.example",
)


@pytest.fixture(scope="module")
def guarded_sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A simulated vLLM that asks for a key of its own."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "key").write_text(UPSTREAM_KEY)
    service = start_simulator(directory, "--api-key-file", str(directory / "key"))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def keyed(guarded_sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy that knows that key."""
    directory = tmp_path_factory.mktemp("keyed")
    (directory / "key").write_text(UPSTREAM_KEY + "\n")
    service = start_proxy(directory, guarded_sim.url, "--upstream-key-file", str(directory / "key"))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def trusting(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy that believes what loopback says about the client."""
    service = start_proxy(tmp_path_factory.mktemp("trusting"), sim.url, "--trusted-proxy", "127.0.0.0/8")
    yield service
    service.stop()


def record(service: Twistd, request_id: str) -> dict[str, object]:
    """Return the one access record with that id, once it has been written."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        log = Path(service.directory / "access.jsonl")
        if log.exists() and log.read_bytes().endswith(b"\n"):
            found = [entry for entry in service.access_records if entry["request_id"] == request_id]
            if found:
                assert len(found) == 1
                return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no access record has the id {request_id}")


def test_headers_pass_in_order_in_case_and_as_often_as_sent(proxy: Twistd) -> None:
    lines = [
        ("X-Zebra", "1"),
        ("x-apple", "2"),
        ("X-ZEBRA", "3"),
        ("X-Zebra", "1"),
        ("aCCept", "text/html;q=0.8, */*"),
        ("Cookie", "a=1; b=2"),
        ("Cookie", "c=3"),
        ("X-Empty", ""),
        ("X-Quoted", '"a, b"\t;c=\\"d\\"'),
        ("X-Latin", "caf\xe9"),
        ("!#$%&'*+-.^_`|~09", "odd name"),
        ("X_Under_Score", "kept"),
        ("User-Agent", "me"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("endpoint-load-metrics-format", "json"),
        ("Cache-Control", "no-cache"),
        ("If-None-Match", '"x"'),
        ("Range", "bytes=0-1"),
        ("Origin", "https://page.example"),
        ("X-Long", "v" * 8000),
    ]
    echoed = echo(proxy, "/vllm/v1/x", *(f"{name}: {value}" for name, value in lines))
    names = {name.lower() for name, _ in lines}
    assert [line for line in received(echoed) if line[0].lower() in names] == lines


def test_nothing_else_is_added(proxy: Twistd) -> None:
    echoed = echo(proxy, "/vllm/v1/x")
    names = sorted(name.lower() for name, _ in received(echoed))
    added = ["via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-request-id"]
    assert names == sorted(["host", "x-vllmsim", *added])


def test_host_is_the_upstreams(proxy: Twistd, sim: Twistd) -> None:
    echoed = echo(proxy, "/vllm/v1/x", host="attacker.example")
    assert values(echoed, "host") == [f"127.0.0.1:{sim.port}"]
    assert values(echoed, "x-forwarded-host") == ["attacker.example"]


def test_the_hops_own_headers_stay_on_their_hop(proxy: Twistd) -> None:
    lines = (
        "Connection: keep-alive, X-Secret",
        "connection: x-other ,Cookie",
        "X-Secret: 1",
        "x-other: 2",
        "X-SECRET: 3",
        "Cookie: a=1",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic YTpi",
        "TE: trailers",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABk",
        "X-Kept: 4",
    )
    echoed = echo(proxy, "/vllm/v1/x", *lines)
    gone = ("x-secret", "x-other", "cookie", "keep-alive", "proxy-connection", "proxy-authorization", "te", "upgrade")
    for name in (*gone, "http2-settings"):
        assert values(echoed, name) == [], name
    assert "x-secret" not in ",".join(values(echoed, "connection")).lower()
    assert values(echoed, "x-kept") == ["4"]


def test_connection_cannot_take_away_what_the_proxy_says(proxy: Twistd, sim: Twistd) -> None:
    names = "close, host, content-length, x-request-id, via, x-forwarded-for, x-forwarded-proto, x-forwarded-host"
    lines = (f"Connection: {names}", "X-Request-Id: stays")
    echoed = echo(proxy, "/vllm/v1/x", *lines, method="POST", body=b"abc")
    assert values(echoed, "host") == [f"127.0.0.1:{sim.port}"]
    assert values(echoed, "content-length") == ["3"]
    assert echoed["body_length"] == 3
    for name in ("x-request-id", "via", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"):
        assert len(values(echoed, name)) == 1, name


@pytest.mark.parametrize("name", ["X-data-parallel-rank", "x-DATA-parallel-rank", "X-Session-ID", "X-Vllm-Priority"])
def test_what_only_an_operator_may_set_is_taken_out(proxy: Twistd, name: str) -> None:
    assert values(echo(proxy, "/vllm/v1/x", f"{name}: 1", f"{name}: 2"), name.lower()) == []


@pytest.mark.parametrize(
    "name",
    ["X_data_parallel_rank", "x_session_id", "X-Vllm_Priority", "X_Api_Key", "Content_Length", "X_Forwarded_For"],
)
def test_look_alikes_with_underscores_do_not_reach_vllm(proxy: Twistd, name: str) -> None:
    answer = ask(proxy, "/vllm/v1/x", "X-Vllmsim: echo", f"{name}: 1")
    assert answer.status == 400 or values(answer.json(), name.lower()) == []


# credentials

CREDENTIALS = ("x-litellm-api-key", "authorization", "api-key", "x-api-key")


@pytest.mark.parametrize("name", CREDENTIALS)
@pytest.mark.parametrize("who", ["master", "virtual"])
def test_the_callers_credential_is_taken_out(proxy: Twistd, name: str, who: str) -> None:
    key = MASTER_KEY if who == "master" else new_key(proxy)
    line = f"{name.title()}: {'Bearer ' if name == 'authorization' else ''}{key}"
    echoed = echo(proxy, "/vllm/v1/x", line, key=None)
    assert values(echoed, name) == []
    assert key not in str(echoed)


def test_credentials_in_several_headers_are_all_taken_out(proxy: Twistd) -> None:
    first = ("X-Api-Key: sk-wrong-3", "API-Key: sk-wrong-2", "Authorization: Basic d3Jvbmc6d3Jvbmc=")
    echoed = echo(proxy, "/vllm/v1/x", *first, f"X-LiteLLM-API-Key: {MASTER_KEY}", key=None)
    assert [name for name, _ in received(echoed) if name.lower() in CREDENTIALS] == []


@pytest.mark.parametrize("winner", range(4))
def test_the_first_credential_in_litellms_order_counts(proxy: Twistd, winner: int) -> None:
    order = [("x-litellm-api-key", ""), ("authorization", "Bearer "), ("api-key", ""), ("x-api-key", "")]

    def lines(first: str, rest: str) -> list[str]:
        given = [f"{name}: {scheme}{first if at == 0 else rest}" for at, (name, scheme) in enumerate(order[winner:])]
        return given[::-1]  # the order on the wire must not matter

    assert ask(proxy, "/vllm/v1/models", *lines(MASTER_KEY, "sk-nobody-0123456789"), key=None).status == 200
    if winner < 3:
        assert ask(proxy, "/vllm/v1/models", *lines("sk-nobody-0123456789", MASTER_KEY), key=None).status == 401


def test_the_upstreams_own_key_replaces_the_callers(keyed: Twistd, guarded_sim: Twistd) -> None:
    assert ask(guarded_sim, "/v1/models", key=None).status == 401
    for line in (f"Authorization: Bearer {MASTER_KEY}", f"x-api-key: {MASTER_KEY}"):
        echoed = echo(keyed, "/vllm/v1/models", line, key=None)
        assert values(echoed, "authorization") == [f"Bearer {UPSTREAM_KEY}"]
        assert values(echoed, "x-api-key") == []
        assert MASTER_KEY not in str(echoed)


def test_the_upstreams_key_does_not_open_the_proxy(keyed: Twistd) -> None:
    assert ask(keyed, "/vllm/v1/models", key=UPSTREAM_KEY).status == 401


def test_no_key_is_ever_logged(keyed: Twistd) -> None:
    ask(keyed, "/vllm/v1/models", "x-request-id: looked-for")
    ask(keyed, "/vllm/v1/models", "x-request-id: refused", key="sk-typo-of-somebody-123456")
    record(keyed, "looked-for")
    record(keyed, "refused")
    text = keyed.log + (keyed.directory / "access.jsonl").read_text()
    for secret in (UPSTREAM_KEY, MASTER_KEY, "sk-typo-of-somebody-123456"):
        assert secret not in text


# where it came from


def test_forwarding_headers_are_added(proxy: Twistd) -> None:
    echoed = echo(proxy, "/vllm/v1/x", host="public.example:8443")
    assert values(echoed, "x-forwarded-for") == ["127.0.0.1"]
    assert values(echoed, "x-forwarded-proto") == ["http"]
    assert values(echoed, "x-forwarded-host") == ["public.example:8443"]
    (via,) = values(echoed, "via")
    assert re.fullmatch(r"1\.1 \S*vllmproxy\S*", via)


def test_a_clients_own_are_replaced(proxy: Twistd) -> None:
    more = ("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Port: 1", "X-Forwarded-Prefix: /x", "Forwarded: for=192.0.2.1")
    echoed = echo(proxy, "/vllm/v1/x", *SPOOFED, *more)
    assert values(echoed, "x-forwarded-for") == ["127.0.0.1"]
    assert values(echoed, "x-forwarded-proto") == ["http"]
    assert values(echoed, "x-forwarded-host") == ["proxy.example"]
    assert len(values(echoed, "via")) == 1
    for trace in ("203.0.113.7", "192.0.2.1", "edge.example", "public.example", "/x'"):
        assert trace not in str(received(echoed))


def test_a_trusted_proxys_are_kept_with_ours_behind_them(trusting: Twistd) -> None:
    echoed = echo(trusting, "/vllm/v1/x", *SPOOFED)
    chain = ", ".join(values(echoed, "x-forwarded-for"))
    assert [part.strip() for part in chain.split(",")] == ["203.0.113.7", "198.51.100.9", "127.0.0.1"]
    assert values(echoed, "x-forwarded-proto") == ["https"]
    assert values(echoed, "x-forwarded-host") == ["public.example"]
    passed = [part.strip() for part in ", ".join(values(echoed, "via")).split(",")]
    assert passed[0] == "1.1 edge.example"
    assert "vllmproxy" in passed[1]


def test_a_trusted_proxy_that_says_nothing_gets_ours(trusting: Twistd) -> None:
    echoed = echo(trusting, "/vllm/v1/x")
    assert values(echoed, "x-forwarded-for") == ["127.0.0.1"]
    assert values(echoed, "x-forwarded-proto") == ["http"]
    assert values(echoed, "x-forwarded-host") == ["proxy.example"]


@pytest.mark.parametrize(
    ("lines", "client"),
    [
        (("X-Forwarded-For: 203.0.113.7",), "203.0.113.7"),
        (("X-Forwarded-For: 203.0.113.7, 127.0.0.9",), "203.0.113.7"),
        (("X-Forwarded-For: 6.6.6.6, 203.0.113.7",), "203.0.113.7"),
        (("X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 203.0.113.7"), "203.0.113.7"),
        (("X-Forwarded-For: 2001:db8::7",), "2001:db8::7"),
        (("X-Forwarded-For: not an address",), "127.0.0.1"),
        (("X-Forwarded-For: ",), "127.0.0.1"),
        ((), "127.0.0.1"),
    ],
)
def test_the_record_shows_the_client_behind_a_trusted_proxy(
    trusting: Twistd, lines: tuple[str, ...], client: str
) -> None:
    answer = ask(trusting, "/vllm/v1/models", *lines)
    assert answer.status == 200
    assert record(trusting, (answer.get("x-request-id") or b"").decode())["client"] == client


def test_the_record_shows_the_peer_otherwise(proxy: Twistd) -> None:
    answer = ask(proxy, "/vllm/v1/models", *SPOOFED)
    assert record(proxy, (answer.get("x-request-id") or b"").decode())["client"] == "127.0.0.1"


# the request id


@pytest.mark.parametrize("sane", ["abc", "0af76519-16cd-43dd-8448-eb211c80319c", "req_01.A", "chatcmpl-1"])
def test_a_sane_request_id_is_taken_over(proxy: Twistd, sim: Twistd, sane: str) -> None:
    unique = f"{sane}-{time.time_ns()}"
    answer = ask(proxy, "/vllm/v1/x", "X-Vllmsim: echo", f"X-Request-ID: {unique}", method="POST", body=b"")
    assert values(answer.json(), "x-request-id") == [unique]
    assert answer.get("x-request-id") == unique.encode()
    assert seen(sim)["executed"][unique] == 1
    assert record(proxy, unique)["status"] == 200


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("X-Request-Id: ",),
        ("X-Request-Id: two words",),
        ("X-Request-Id: a,b",),
        ('X-Request-Id: "quoted"',),
        ("X-Request-Id: caf\xe9",),
        ("X-Request-Id: <script>",),
        ("X-Request-Id: " + "a" * 1000,),
        ("X-Request-Id: first", "X-Request-Id: second"),
    ],
)
def test_another_one_is_replaced(proxy: Twistd, lines: tuple[str, ...]) -> None:
    answer = ask(proxy, "/vllm/v1/x", "X-Vllmsim: echo", *lines)
    (given,) = values(answer.json(), "x-request-id")
    assert re.fullmatch(r"[A-Za-z0-9_.:-]{8,128}", given)
    assert answer.get("x-request-id") == given.encode()
    assert record(proxy, given)["route"] == "/v1/x"


def test_made_ids_differ(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        ids = set()
        for _ in range(20):
            connection.send(request("/vllm/v1/models"))
            ids.add(connection.answer().get("x-request-id"))
    assert len(ids) == 20


def test_vllms_own_request_id_does_not_come_twice(proxy: Twistd) -> None:
    line = "X-Vllmsim: status; code=200; header=X-Request-Id:of-vllm"
    assert ask(proxy, "/vllm/v1/x", line, "X-Request-Id: of-mine").get("x-request-id") == b"of-mine"


@pytest.mark.parametrize(
    ("target", "key", "status"),
    [("/vllm/v1/models", None, 401), ("/vllm//v1/models", MASTER_KEY, 400), ("/vllm/v1/models", "sk-no-such-key", 401)],
)
def test_a_refusal_carries_the_request_id_too(proxy: Twistd, target: str, key: str | None, status: int) -> None:
    unique = f"refusal-{time.time_ns()}"
    answer = ask(proxy, target, f"X-Request-Id: {unique}", key=key)
    assert (answer.status, answer.get("x-request-id")) == (status, unique.encode())
    entry = record(proxy, unique)
    assert (entry["status"], entry["ended"]) == (status, "refused")


# what must not leak from one caller to the next


def test_cookies_of_vllm_are_not_replayed(proxy: Twistd) -> None:
    answer = ask(proxy, "/vllm/v1/x", "X-Vllmsim: status; code=200; set-cookie=session=of-the-first")
    assert answer.all("set-cookie") == [b"session=of-the-first"]
    assert values(echo(proxy, "/vllm/v1/x"), "cookie") == []
