"""SIGHUP to a real process: what changes for requests to come, what does not, and what is said of a mistake."""

import json
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from _asking import CHAT, ask, make_key, until
from _ports import free_port
from _raw import Ended, Wire, connect, request
from _service import MASTER_KEY, START_SECONDS, Twistd, run, start, start_simulator

MODELS = "/vllm/v1/models"
LONG = request(b"GET", b"/vllm/x", b"X-Vllmsim: bytes; length=40000; chunk=1; delay=0.05; chunked=1")
OTHER_KEY = "sk-another-master-0123456789"


class Reloadable:
    """A proxy with all its settings in a file.

    :ivar settings: what the file holds, by name.
    """

    def __init__(self, directory: Path, upstream: str, endpoint: str, **settings: Any) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "master-key").write_text(MASTER_KEY)
        port = free_port()
        self.settings: dict[str, Any] = {
            "upstream": upstream,
            "listen": [endpoint.format(port=port)],
            "master-key-file": "master-key",
            "access-log": "access.jsonl",
            "drain-timeout": 1,
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        self.write()
        self.service = start(directory, "vllmproxy", "--config", "vllmproxy.toml", port=port)
        self._reloads = 0

    def write(self, text: str | None = None) -> None:
        lines = [f"{name} = {_toml(value)}\n" for name, value in self.settings.items()]
        (self.directory / "vllmproxy.toml").write_text("".join(lines) if text is None else text)

    def reload(self, **settings: Any) -> str:
        """Change settings, reload, and return what was logged of it."""
        self.settings |= {name.replace("_", "-"): value for name, value in settings.items()}
        self.write()
        return self.hang_up()

    def hang_up(self) -> str:
        """Send SIGHUP and return what was logged until it was done."""
        before = len(self.service.log)
        self.service.process.send_signal(signal.SIGHUP)
        ends = ("no setting changed", " changed\n", "stay as they are")
        until(lambda: any(end in self.service.log[before:] for end in ends))
        return self.service.log[before:]

    def status(self, path: str = MODELS, key: str | None = MASTER_KEY, **more: Any) -> int:
        return ask(self.service, "GET", path, key=key, **more).status


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else repr(value)


Make = Callable[..., Reloadable]


@pytest.fixture
def make(tmp_path: Path, sim: Twistd) -> Iterator[Make]:
    made: list[Reloadable] = []

    def make_one(endpoint: str = "tcp:{port}:interface=127.0.0.1", **settings: Any) -> Reloadable:
        made.append(Reloadable(tmp_path / f"proxy{len(made)}", sim.url, endpoint, **settings))
        return made[-1]

    yield make_one
    for each in made:
        each.service.stop()
        assert "Traceback" not in each.service.log
        assert "Unhandled" not in each.service.log


def begun(proxy: Reloadable) -> Wire:
    """Ask for a long stream and return when some of it has come."""
    wire = connect(proxy.service)
    wire.send(LONG)
    assert wire.head().status == 200
    wire.chunk()
    return wire


def test_nothing_has_changed(make: Make) -> None:
    proxy = make()
    with begun(proxy) as stream:
        assert "no setting changed" in proxy.hang_up()
        assert "#warn" not in proxy.service.log
        stream.chunk()
    assert proxy.status() == 200


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("head-timeout = ", "is not TOML"),
        ("head-timeout = " + "[" * 20_000, "nests too deeply"),
        ("max-body = " + "9" * 5000, "a number of thousands of digits"),
        ('upstream = "http://127.0.0.1:9"\nhead-timeout = 1e-300\n', "give 0.001 or more"),
        ("head-time-out = 3\n", "did you mean 'head-timeout'?"),
        ('upstream = "http://127.0.0.1:9"\nhead-timeout = 0\n', "give 0.001 or more"),
        ('upstream = "http://127.0.0.1:9"\nmaster-key-file = "not-there"\n', "not-there"),
        ('upstream = "http://127.0.0.1:9"\nprices = "not-there.toml"\n', "not-there.toml"),
    ],
)
def test_a_bad_file_changes_nothing_and_says_why(make: Make, mistake: str, says: str) -> None:
    proxy = make()
    proxy.write(mistake)
    (line,) = [line for line in proxy.hang_up().splitlines() if "#error" in line]
    assert "the settings stay as they are" in line
    assert says in line
    assert proxy.status() == 200
    proxy.write()
    assert "no setting changed" in proxy.hang_up()


def test_a_file_that_is_gone(make: Make) -> None:
    proxy = make()
    (proxy.directory / "vllmproxy.toml").unlink()
    assert "No such file" in proxy.hang_up()
    assert proxy.status() == 200


def test_another_master_key_also_on_connections_that_are_open(make: Make) -> None:
    proxy = make()
    virtual = make_key(proxy.service)["key"]
    models = request(b"GET", b"/vllm/v1/models")
    with connect(proxy.service) as idle:
        idle.send(models)
        assert idle.message().status == 200
        (proxy.directory / "master-key").write_text(OTHER_KEY)
        assert "master-key-file changed" in proxy.hang_up()
        idle.send(models)
        assert idle.message().status == 401
    assert [proxy.status(key=key) for key in (MASTER_KEY, OTHER_KEY, virtual)] == [401, 200, 200]
    assert OTHER_KEY not in proxy.service.log


@pytest.mark.parametrize("endpoint", ["tcp:{port}", "tcp:{port}:interface=127.0.0.1"])
def test_auth_is_not_switched_off(make: Make, endpoint: str) -> None:
    """Whether others could reach it or not, and asked for or not: a file may be empty for a moment."""
    proxy = make(endpoint)
    del proxy.settings["master-key-file"]
    for more in ({}, {"open": True}):
        (line,) = [line for line in proxy.reload(**more).splitlines() if "#error" in line]
        assert "the settings stay as they are: there is no master key any more" in line
        assert [proxy.status(key=None), proxy.status()] == [401, 200]


def test_auth_is_switched_on_and_stays_so(make: Make) -> None:
    proxy = make()
    del proxy.settings["master-key-file"]
    proxy.service.stop()
    proxy.write()
    proxy.service = start(proxy.directory, "vllmproxy", "--config", "vllmproxy.toml", port=proxy.service.port)
    assert proxy.status(key=None) == 200
    assert "idle-timeout changed" in proxy.reload(idle_timeout=70)
    assert proxy.status(key=None) == 200
    assert "master-key-file changed" in proxy.reload(master_key_file="master-key")
    assert proxy.status(key=None) == 401
    del proxy.settings["master-key-file"]
    assert "there is no master key any more" in proxy.reload()
    assert proxy.status(key=None) == 401


def test_another_upstream_while_a_stream_goes_on(make: Make, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-of-vllm-itself")
    other = start_simulator(tmp_path / "other", "--api-key-file", str(tmp_path / "key"))
    try:
        proxy = make()
        with begun(proxy) as stream:
            log = proxy.reload(upstream=other.url + "/v1", upstream_key_file=str(tmp_path / "key"))
            assert "upstream, upstream-key-file changed" in log
            reply = ask(proxy.service, "GET", "/vllm/models", key=MASTER_KEY, headers={"X-Vllmsim": "echo"}).json()
            assert reply["target"] == "/v1/models"
            assert ["authorization", "Bearer sk-of-vllm-itself"] in [
                [name.lower(), value] for name, value in reply["headers"]
            ]
            assert proxy.status("/health/readiness") == 200
            stream.chunk()
            other.stop()
            until(lambda: proxy.status("/health/readiness") == 503)
            stream.chunk()
            proxy.service.process.send_signal(signal.SIGTERM)
            assert stream.rest()[1] == "reset"  # its connection to the former upstream ends with the rest
    finally:
        other.stop()


def test_sizes_prices_and_who_is_trusted(make: Make) -> None:
    proxy = make()
    budget = {"max_budget": 1.0}
    assert ask(proxy.service, "POST", "/key/generate", budget, key=MASTER_KEY).status == 400
    (proxy.directory / "prices.toml").write_text('[models."*"]\ninput = 1.0\noutput = 1.0\n')
    log = proxy.reload(
        max_target=2000, max_headers=40, max_head=3000, prices="prices.toml", trusted_proxy=["127.0.0.1/32"]
    )
    for name in ("max-target", "max-headers", "max-head", "prices", "trusted-proxy"):
        assert name in log
    assert proxy.status("/" + "a" * 2500) == 414
    assert proxy.status(headers={f"x-{number}": "y" for number in range(50)}) == 431
    assert proxy.status(headers={"x": "y" * 3500}) == 431
    assert ask(proxy.service, "POST", "/key/generate", budget, key=MASTER_KEY).status == 200
    headers = {"X-Vllmsim": "echo", "X-Forwarded-For": "192.0.2.7"}
    echoed = ask(proxy.service, "GET", MODELS, key=MASTER_KEY, headers=headers).json()["headers"]
    assert ["x-forwarded-for", "192.0.2.7, 127.0.0.1"] in [[name.lower(), value] for name, value in echoed]
    assert "max-body" in proxy.reload(max_body=100)
    refused = ask(
        proxy.service,
        "POST",
        "/vllm/v1/chat/completions",
        {"a": "b" * 200},
        key=MASTER_KEY,
        headers={"X-Request-ID": "mine-1"},
    )
    assert refused.status == 413
    assert refused.headers["x-request-id"] == "mine-1"
    assert proxy.reload(max_body=0, max_api_body=100)
    assert ask(proxy.service, "POST", "/key/generate", {"metadata": {"a": "b" * 200}}, key=MASTER_KEY).status == 413


def test_who_is_trusted_may_have_more_connections_than_a_client(make: Make) -> None:
    proxy = make(max_connections_per_client=2)

    def answered() -> int:
        """How many of three connections at once are answered; fewer where former ones have not been left yet."""
        count = 0
        with connect(proxy.service) as first, connect(proxy.service) as second, connect(proxy.service) as third:
            for wire in (first, second, third):
                with suppress(OSError, Ended):
                    wire.send(request(b"GET", b"/health/liveliness"))
                    count += wire.message().status == 200
        return count

    until(lambda: answered() == 2)
    proxy.reload(trusted_proxy=["127.0.0.0/8"])
    until(lambda: answered() == 3)
    proxy.reload(trusted_proxy=["192.0.2.0/24"])
    until(lambda: answered() == 2)


def test_times_hold_for_connections_that_are_open_too(make: Make) -> None:
    proxy = make(head_timeout=600, first_byte_timeout=600)
    with connect(proxy.service) as slow, connect(proxy.service) as waiting:
        slow.send(b"GET / HTTP/1.1\r\n")
        waiting.send(
            request(b"POST", b"/vllm/v1/chat/completions", b"X-Vllmsim: ttft=3600", body=json.dumps(CHAT).encode())
        )
        assert "first-byte-timeout" in proxy.reload(head_timeout=0.5, first_byte_timeout=0.5)
        assert slow.message().status == 408
        assert waiting.message().status == 504


def test_what_needs_a_restart_is_named_and_left_as_it_was(make: Make) -> None:
    proxy = make()
    listen = [f"tcp:{free_port()}:interface=127.0.0.1"]
    for _ in range(2):  # until the restart it is said each time
        log = proxy.reload(listen=listen, store="memory:", cut_revoked=True, head_timeout=7)
        (line,) = [line for line in log.splitlines() if "#warn" in line]
        assert line.endswith("only after a restart: listen, store, cut-revoked")
        assert proxy.status() == 200
    assert "no setting changed" in log


def test_the_simulator_stays(tmp_path: Path) -> None:
    port = free_port()
    listen = f'listen = ["tcp:{port}:interface=127.0.0.1"]\nsimulate = true\n'
    (tmp_path / "c.toml").write_text(listen)
    service = start(tmp_path, "vllmproxy", "--config", "c.toml", port=port)
    try:
        until(lambda: "Listening on" in service.log)
        key = (tmp_path / "state" / "vllmproxy" / "master-key").read_text().strip()
        for text in (listen + "idle-timeout = 5\n", listen.replace("simulate = true", 'upstream = "http://x"')):
            (tmp_path / "c.toml").write_text(text)
            service.process.send_signal(signal.SIGHUP)
            until(lambda text=text: "idle-timeout changed" in service.log)  # type: ignore[misc]
            assert ask(service, "GET", MODELS, key=key).status == 200
        until(lambda: "only after a restart: simulate" in service.log)
        assert ask(service, "GET", MODELS, key=key).status == 200
    finally:
        service.stop()
    assert "Traceback" not in service.log


def test_the_access_log_is_still_reopened(make: Make) -> None:
    proxy = make()
    assert proxy.status() == 200
    until(lambda: len(proxy.service.access_records) == 1)
    (proxy.directory / "access.jsonl").rename(proxy.directory / "access.jsonl.1")
    proxy.hang_up()
    assert proxy.status() == 200
    until(lambda: len(proxy.service.access_records) == 1)


# certificates


class Pem:
    """A certificate's file, and what trusts the authority that it is of now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.issue()

    def issue(self) -> None:
        authority = trustme.CA()
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(self.path))
        self.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(self.trust)
        self.trust.set_alpn_protocols(["h2", "http/1.1"])

    @property
    def endpoint(self) -> str:
        return f"ssl:{{port}}:privateKey={self.path}:certKey={self.path}:interface=127.0.0.1"

    def connect(self, service: Twistd, trust: ssl.SSLContext | None = None) -> Wire:
        raw = socket.create_connection(("127.0.0.1", service.port), timeout=30)
        try:
            wrapped = (trust or self.trust).wrap_socket(raw, server_hostname="localhost")
        except ssl.SSLError:
            raw.close()
            raise
        assert wrapped.selected_alpn_protocol() == "http/1.1"
        return Wire(wrapped)


def test_certificates_are_read_again_for_new_connections(make: Make, tmp_path: Path) -> None:
    pem = Pem(tmp_path / "server.pem")
    proxy = make(pem.endpoint)
    old = pem.trust
    with pem.connect(proxy.service) as running:
        running.send(LONG)
        assert running.head().status == 200
        pem.issue()
        with pytest.raises(ssl.SSLCertVerificationError):
            pem.connect(proxy.service)
        proxy.hang_up()
        with pem.connect(proxy.service) as fresh:
            fresh.send(request(b"GET", b"/vllm/v1/models"))
            assert fresh.message().status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            pem.connect(proxy.service, old)
        for _ in range(3):
            assert running.chunk()


@pytest.mark.parametrize("kind", ["gone", "no certificate", "another key"])
def test_a_bad_certificate_leaves_the_old_one(make: Make, tmp_path: Path, kind: str) -> None:
    pem = Pem(tmp_path / "server.pem")
    proxy = make(pem.endpoint)
    if kind == "gone":
        pem.path.unlink()
    elif kind == "no certificate":
        pem.path.write_text("this is none")
    else:
        key = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
        certificate = pem.path.read_bytes()
        begin = certificate.index(b"-----BEGIN CERTIFICATE-----")
        pem.path.write_bytes(key + certificate[begin:])
    log = proxy.reload(head_timeout=7)
    (line,) = [line for line in log.splitlines() if "#error" in line]
    assert f"the certificate of ssl:{proxy.service.port}:" in line
    assert "stays the old one" in line
    assert "head-timeout changed" in log  # that has nothing to do with it
    with pem.connect(proxy.service) as fresh:
        fresh.send(request(b"GET", b"/vllm/v1/models"))
        assert fresh.message().status == 200


# what systemd hears


def test_what_systemd_hears_of_it_all(tmp_path: Path, sim: Twistd) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_SECONDS)
        listen = f"tcp:{free_port()}:interface=127.0.0.1"
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        process = run(tmp_path, "vllmproxy", "--upstream", sim.url, "--listen", listen, env=env)
        try:
            heard = [manager.recv(100).decode().split("\n")[0] for _ in range(4)]
            assert heard == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]
            for number, expected in (
                (signal.SIGHUP, ["RELOADING=1", "READY=1"]),
                (signal.SIGTERM, ["STOPPING=1"]),
            ):
                process.send_signal(number)
                heard = []
                while len(heard) < len(expected):
                    message = manager.recv(100).decode().split("\n")[0]
                    heard += [message] if message != "WATCHDOG=1" else []
                assert heard == expected
            assert process.wait(START_SECONDS) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        finally:
            process.kill()
            process.wait()
