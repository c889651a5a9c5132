"""What an endpoint says of its certificate, apart from where it listens."""

import pytest

from vllmproxy.certificates import split_endpoint


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
