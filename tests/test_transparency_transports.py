"""vLLM behind a UNIX socket and behind TLS, and the proxy itself behind TLS."""

import os
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from _ports import free_port
from _service import MASTER_KEY, Twistd, run, start, start_proxy
from _wire import Answer, Wire, ask, compare, echo, request, values, wire
from attrs import define


@define
class Authority:
    """A certificate authority and a certificate of it for loopback, as files."""

    ca: Path
    server: Path

    @classmethod
    def make(cls, directory: Path) -> "Authority":
        authority = trustme.CA()
        made = cls(directory / "ca.pem", directory / "server.pem")
        authority.cert_pem.write_to_path(str(made.ca))
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(made.server))
        return made

    def endpoint(self, port: int) -> str:
        return f"ssl:{port}:privateKey={self.server}:certKey={self.server}:interface=127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


@contextmanager
def simulator(directory: Path, endpoint: str, port: int) -> Iterator[Twistd]:
    service = start(directory, "vllmsim", "--listen", endpoint, port=port)
    try:
        yield service
    finally:
        service.stop()


# UNIX


@pytest.fixture(scope="module")
def unix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy in front of a simulated vLLM on a UNIX socket."""
    directory = tmp_path_factory.mktemp("unix")
    with tempfile.TemporaryDirectory(prefix="sim-") as short:  # sun_path has 108 bytes
        path = os.path.join(short, "s")
        process = run(directory / "sim", "vllmsim", "--listen", f"unix:{path}")
        sim = Twistd(process, 0, directory / "sim")
        deadline = time.monotonic() + 60
        while not os.path.exists(path):
            assert process.poll() is None, sim.log
            assert time.monotonic() < deadline
            time.sleep(0.02)
        service = start_proxy(directory / "proxy", f"unix:{path}")
        yield service
        service.stop()
        sim.stop()


def test_an_upstream_on_a_unix_socket(unix: Twistd, sim: Twistd) -> None:
    compare(ask(unix, "/vllm/v1/nothing"), ask(sim, "/v1/nothing"))
    echoed = echo(unix, "/vllm/v1/x?a=%20&a=2", method="POST", body=b"abc")
    assert (echoed["target"], echoed["body_length"]) == ("/v1/x?a=%20&a=2", 3)
    assert values(echoed, "host") == ["localhost"]


def test_bare_paths_are_mapped_on_a_unix_socket(unix: Twistd) -> None:
    assert echo(unix, "/vllm/chat/completions")["target"] == "/v1/chat/completions"
    assert ask(unix, "/vllm/models").status == 200


def test_a_redirect_of_an_upstream_on_a_unix_socket_can_be_followed(unix: Twistd) -> None:
    location = ask(unix, "/vllm/v1/models/").get("location") or b""
    assert location.removeprefix(b"http://proxy.example") == b"/vllm/v1/models"


def test_a_unix_socket_that_is_not_there(tmp_path: Path) -> None:
    proxy = start_proxy(tmp_path, f"unix:{tmp_path}/nobody")
    try:
        unreachable(ask(proxy, "/vllm/v1/models"), proxy)
    finally:
        proxy.stop()


def unreachable(answer: Answer, proxy: Twistd, status: int = 503) -> None:
    """Check a failure to connect: JSON, no address and no traceback, neither to the client nor in the log."""
    assert answer.status == status, answer
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == str(answer.status)
    text = answer.body.decode()
    for leak in ("127.0.0.1", "localhost", "nobody", "Traceback", "twisted", "OpenSSL", "<"):
        assert leak not in text
    assert "Traceback" not in proxy.log


# TLS towards vLLM


@pytest.fixture(scope="module")
def tls_sim(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    port = free_port()
    with simulator(tmp_path_factory.mktemp("tls-sim"), authority.endpoint(port), port) as service:
        yield service


@pytest.fixture(scope="module")
def tls(tls_sim: Twistd, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy that is spoken to over TLS, in front of a simulated vLLM that is, too."""
    port = free_port()
    directory = tmp_path_factory.mktemp("tls")
    arguments = ("--upstream", f"https://localhost:{tls_sim.port}", "--listen", authority.endpoint(port))
    env = {"VLLMPROXY_MASTER_KEY": MASTER_KEY, "SSL_CERT_FILE": str(authority.ca)}
    service = start(directory, "vllmproxy", *arguments, "--access-log", "access.jsonl", port=port, env=env)
    yield service
    assert "Traceback" not in service.log
    service.stop()


def tls_wire(service: Twistd, authority: Authority) -> Wire:
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.set_alpn_protocols(["h2", "http/1.1"])  # as curl and the SDKs do
    return Wire(context.wrap_socket(service.connect(), server_hostname="localhost"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_an_https_upstream(tls_sim: Twistd, authority: Authority, tmp_path: Path, host: str) -> None:
    upstream, env = f"https://{host}:{tls_sim.port}", {"SSL_CERT_FILE": str(authority.ca)}
    proxy = start_proxy(tmp_path, upstream, env=env)
    try:
        echoed = echo(proxy, "/vllm/v1/x?a=%20", method="POST", body=bytes(range(256)) * 4000)
        assert (echoed["target"], echoed["body_length"]) == ("/v1/x?a=%20", 1_024_000)
        assert values(echoed, "host") == [f"{host}:{tls_sim.port}"]
        assert values(echoed, "x-forwarded-proto") == ["http"]
        with wire(proxy) as connection:
            for chunked in ("0", "1"):
                connection.send(request("/vllm/v1/x", f"X-Vllmsim: bytes; length=3000000; chunked={chunked}"))
                assert connection.answer().body == (bytes(range(251)) * 12000)[:3_000_000]
            connection.send(request("/vllm/v1/models/"))
            location = (connection.answer().get("location") or b"").removeprefix(b"http://proxy.example")
            assert location == b"/vllm/v1/models"
    finally:
        proxy.stop()
    assert "Traceback" not in proxy.log


def test_tls_on_both_sides(tls: Twistd, authority: Authority) -> None:
    with tls_wire(tls, authority) as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: echo", method="POST", body=b"y" * 500_000))
        echoed = connection.answer().json()
        assert echoed["body_length"] == 500_000
        assert values(echoed, "x-forwarded-proto") == ["https"]
        connection.send(request("/vllm/v1/x", "X-Vllmsim: bytes; length=3000000; chunked=1"))
        assert connection.answer().body == (bytes(range(251)) * 12000)[:3_000_000]
        body = b'{"model":"qwen2.5-7b-instruct","prompt":"a","max_tokens":3,"stream":true}'
        connection.send(request("/vllm/v1/completions", "Content-Type: application/json", method="POST", body=body))
        assert connection.answer().body.endswith(b"data: [DONE]\n\n")
        connection.send(request("/vllm/version", "Connection: close"))
        assert connection.answer().status == 200
        assert connection.ended()


def test_pipelining_over_tls(tls: Twistd, authority: Authority) -> None:
    with tls_wire(tls, authority) as connection:
        connection.send(b"".join(request(f"/vllm/v1/x?{n}", "X-Vllmsim: echo") for n in range(20)))
        assert [connection.answer().json()["target"] for _ in range(20)] == [f"/v1/x?{n}" for n in range(20)]


def test_a_certificate_of_a_stranger_is_refused(tls_sim: Twistd, tmp_path: Path) -> None:
    stranger = Authority.make(tmp_path)
    upstream, env = f"https://localhost:{tls_sim.port}", {"SSL_CERT_FILE": str(stranger.ca)}
    proxy = start_proxy(tmp_path / "proxy", upstream, env=env)
    try:
        for _ in range(2):
            unreachable(ask(proxy, "/vllm/v1/models"), proxy)
        answer = ask(proxy, "/vllm/v1/x", method="POST", body=b"secret" * 100_000)
        unreachable(answer, proxy)
    finally:
        proxy.stop()


def test_a_certificate_for_another_name_is_refused(tls_sim: Twistd, authority: Authority, tmp_path: Path) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    other.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    port = free_port()
    with simulator(tmp_path / "sim", Authority(tmp_path / "ca.pem", tmp_path / "server.pem").endpoint(port), port):
        env = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        proxy = start_proxy(tmp_path / "proxy", f"https://localhost:{port}", env=env)
        try:
            unreachable(ask(proxy, "/vllm/v1/models"), proxy)
        finally:
            proxy.stop()


def test_plain_http_where_tls_is_expected(sim: Twistd, authority: Authority, tmp_path: Path) -> None:
    env = {"SSL_CERT_FILE": str(authority.ca)}
    proxy = start_proxy(tmp_path, f"https://localhost:{sim.port}", env=env)
    try:
        unreachable(ask(proxy, "/vllm/v1/models"), proxy)
    finally:
        proxy.stop()


def test_tls_where_plain_http_is_expected(tls_sim: Twistd, tmp_path: Path) -> None:
    proxy = start_proxy(tmp_path, tls_sim.url)
    try:
        unreachable(ask(proxy, "/vllm/v1/models"), proxy, 502)  # it was sent, and no HTTP came back
    finally:
        proxy.stop()


def test_ipv6(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    sim = run(tmp_path / "sim", "vllmsim", "--listen", f"tcp6:{port}:interface=\\:\\:1")
    service = Twistd(sim, port, tmp_path / "sim")
    proxy = start_proxy(tmp_path / "proxy", f"http://[::1]:{port}")
    try:
        deadline = time.monotonic() + 60
        while ask(proxy, "/vllm/version").status != 200:
            assert time.monotonic() < deadline, proxy.log + service.log
            time.sleep(0.05)
        assert values(echo(proxy, "/vllm/v1/x"), "host") == [f"[::1]:{port}"]
    finally:
        proxy.stop()
        service.stop()
