"""What an endpoint says of its certificate, apart from where it listens."""

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from twisted.internet.protocol import Factory

from vllmproxy.certificates import Certificate, split_endpoint
from vllmproxy.listening import CannotListen, secured


@pytest.mark.parametrize(
    ("description", "below", "arguments"),
    [
        ("tcp:4000:interface=127.0.0.1", "tcp:4000:interface=127.0.0.1", None),
        ("unix:/run/privateKey=x.sock", "unix:/run/privateKey=x.sock", None),
        ("systemd:domain=INET:name=http", "systemd:domain=INET:name=http", None),
        ("ssl:443", "tcp:443", ""),
        ("ssl:443:privateKey=k.pem:certKey=c.pem", "tcp:443", ":privateKey=k.pem:certKey=c.pem"),
        ("tls:443:certKey=c.pem:interface=::1".replace("::", "\\:\\:"), "tcp:443:interface=\\:\\:1", ":certKey=c.pem"),
        ("ssl:port=443:certKey=a\\:b.pem:backlog=9", "tcp:port=443:backlog=9", ":certKey=a\\:b.pem"),
        (
            "systemd:domain=INET:privateKey=k.pem:index=0:certKey=c.pem:extraCertChain=d.pem",
            "systemd:domain=INET:index=0",
            ":privateKey=k.pem:certKey=c.pem:extraCertChain=d.pem",
        ),
    ],
)
def test_an_endpoint_and_its_certificate(description: str, below: str, arguments: str | None) -> None:
    assert split_endpoint(description) == (below, arguments)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = trustme.CA().issue_cert("localhost")
    key = made.private_key_pem.bytes()
    locked = load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")
    )
    contents = {"key": key, "cert": made.cert_chain_pems[0].bytes(), "junk": b"nothing\n", "locked": locked}
    paths = {name: tmp_path / f"{name}:.pem" for name in (*contents, "absent", "directory")}
    paths["directory"].mkdir()
    for name, content in contents.items():
        paths[name].write_bytes(content)
    return paths


@pytest.mark.parametrize(
    ("said", "setting", "file", "problem"),
    [
        ("privateKey={absent}:certKey={cert}", "privateKey", "absent", "cannot be read (No such file or directory)"),
        ("privateKey={directory}:certKey={cert}", "privateKey", "directory", "cannot be read (Is a directory)"),
        ("privateKey={junk}:certKey={cert}", "privateKey", "junk", "holds no private key in PEM that needs no pass"),
        (
            "privateKey={locked}:certKey={cert}",
            "privateKey",
            "locked",
            "holds no private key in PEM that needs no pass",
        ),
        ("privateKey={cert}:certKey={cert}", "privateKey", "cert", "holds no private key in PEM that needs no pass"),
        ("privateKey={key}:certKey={absent}", "certKey", "absent", "cannot be read (No such file or directory)"),
        ("privateKey={key}:certKey={key}", "certKey", "key", "holds no certificate in PEM"),
        ("privateKey={key}", "certKey", "key", "holds no certificate in PEM"),
        ("privateKey={key}:certKey={cert}:extraCertChain={absent}", "extraCertChain", "absent", "cannot be read"),
        ("privateKey={key}:certKey={cert}:dhParameters={absent}", "dhParameters", "absent", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    files: dict[str, Path], said: str, setting: str, file: str, problem: str
) -> None:
    quoted = {name: str(path).replace(":", "\\:") for name, path in files.items()}
    Certificate(f":privateKey={quoted['key']}:certKey={quoted['cert']}")
    with pytest.raises(ValueError, match=setting) as caught:
        Certificate(f":{said.format(**quoted)}")
    assert str(caught.value).startswith(f"{setting}={str(files[file])!r} {problem}")


def test_a_method_that_openssl_does_not_have(files: dict[str, Path]) -> None:
    quoted = {name: str(path).replace(":", "\\:") for name, path in files.items()}
    description = f"ssl:0:privateKey={quoted['key']}:certKey={quoted['cert']}:sslmethod=SSLv9_METHOD"
    with pytest.raises(CannotListen, match="SSLv9_METHOD") as caught:
        secured(description, Factory())
    assert str(caught.value).startswith(f"cannot listen on {description}: ")


def test_where_no_file_is_named_it_is_the_one_that_twisted_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^privateKey='server\.pem' cannot be read"):
        Certificate("")
