"""vLLM's certificate: whose is taken, and that the reason stands in the log where one is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from _ports import free_port
from _service import Twistd, start, start_proxy
from _wire import ask

NOW = datetime.now(UTC)
AGO, LONG_AGO = NOW - timedelta(days=1), NOW - timedelta(days=30)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@contextmanager
def upstream(directory: Path, certificate: trustme.LeafCert) -> Iterator[str]:
    """A simulated vLLM with that certificate; gives its URL."""
    directory.mkdir()
    pem, port = directory / "server.pem", free_port()
    certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
    endpoint = f"ssl:{port}:privateKey={pem}:certKey={pem}:interface=127.0.0.1"
    service = start(directory, "vllmsim", "--listen", endpoint, port=port)
    try:
        yield f"https://localhost:{port}"
    finally:
        service.stop()


@contextmanager
def proxy(directory: Path, url: str, *options: str, env: dict[str, str] | None = None) -> Iterator[Twistd]:
    service = start_proxy(directory, url, *options, env=env)
    try:
        yield service
    finally:
        service.stop()
        assert "Traceback" not in service.log


def test_an_authority_of_one_s_own(tmp_path: Path, authority: trustme.CA, ca: Path) -> None:
    other = tmp_path / "others.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    other.write_bytes(b"a comment\n" + other.read_bytes() + ca.read_bytes())
    with upstream(tmp_path / "sim", authority.issue_cert("localhost")) as url:
        for name, pem in (("one", ca), ("two", other)):
            with proxy(tmp_path / name, url, "--upstream-ca", str(pem)) as service:
                assert ask(service, "/vllm/v1/models").status == 200
                assert ask(service, "/health/readiness").status == 200


def test_it_stands_instead_of_the_system_s(tmp_path: Path, authority: trustme.CA, ca: Path) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    with (
        upstream(tmp_path / "sim", authority.issue_cert("localhost")) as url,
        proxy(tmp_path / "p", url, "--upstream-ca", str(stranger), env={"SSL_CERT_FILE": str(ca)}) as service,
    ):
        assert ask(service, "/vllm/v1/models").status == 503


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("expired", "certificate verify failed"),
        ("not valid yet", "certificate verify failed"),
        ("another name", "mismatched_id=DNS_ID(hostname=b'localhost')"),
        ("unknown authority", "certificate verify failed"),
    ],
)
def test_a_certificate_that_is_not_good(
    tmp_path: Path, authority: trustme.CA, ca: Path, kind: str, reason: str
) -> None:
    certificates = {
        "expired": lambda: authority.issue_cert("localhost", not_before=LONG_AGO, not_after=AGO),
        "not valid yet": lambda: authority.issue_cert("localhost", not_before=NOW + timedelta(days=1)),
        "another name": lambda: authority.issue_cert("elsewhere.example"),
        "unknown authority": lambda: trustme.CA().issue_cert("localhost"),
    }
    with (
        upstream(tmp_path / "sim", certificates[kind]()) as url,
        proxy(tmp_path / "proxy", url, "--upstream-ca", str(ca)) as service,
    ):
        for _ in range(2):
            answer = ask(service, "/vllm/v1/models")
            assert answer.status == 503
            assert answer.json()["error"]["code"] == "503"
            assert b"ertificate" not in answer.body  # that is for whoever runs it
        assert ask(service, "/health/readiness").status == 503
        (line,) = [line for line in service.log.splitlines() if "cannot be reached" in line]
        assert url in line
        assert reason in line, line
