"""Which texts name an upstream, and what they turn into."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.upstreams.upstream import Upstream


@pytest.mark.parametrize(
    ("text", "host", "port", "authority", "name"),
    [
        ("http://gpu1:8000", "gpu1", 8000, b"gpu1:8000", "http://gpu1:8000"),
        ("http://gpu1", "gpu1", 80, b"gpu1", "http://gpu1"),
        ("HTTP://GPU1:80/", "gpu1", 80, b"gpu1", "http://gpu1"),
        (
            "https://vllm.example.com",
            "vllm.example.com",
            443,
            b"vllm.example.com",
            "https://vllm.example.com",
        ),
        ("https://h:443/v1", "h", 443, b"h", "https://h/v1"),
        ("https://h:80/v1/", "h", 80, b"h:80", "https://h:80/v1"),
        ("http://h/a/b%20c", "h", 80, b"h", "http://h/a/b%20c"),
        ("http://127.0.0.1:1", "127.0.0.1", 1, b"127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[::1]:8000/v1", "::1", 8000, b"[::1]:8000", "http://[::1]:8000/v1"),
        ("http://[2001:DB8:0::1]", "2001:db8::1", 80, b"[2001:db8::1]", "http://[2001:db8::1]"),
        ("http://gpu_1.a.:65535", "gpu_1.a.", 65535, b"gpu_1.a.:65535", "http://gpu_1.a.:65535"),
    ],
)
def test_tcp(text: str, host: str, port: int, authority: bytes, name: str) -> None:
    upstream = Upstream.parse(text)
    assert (upstream.host, upstream.port, upstream.authority) == (host, port, authority)
    assert upstream.scheme == name.partition(":")[0]
    assert upstream.origin == upstream.scheme.encode() + b"://" + authority
    assert upstream.origin + upstream.base_path == name.encode()
    assert upstream.socket_path is None
    assert upstream.name == name


@pytest.mark.parametrize("text", ["unix:/run/vllm.sock", "unix:///run/vllm.sock", "UNIX:/run/vllm.sock"])
def test_unix(text: str) -> None:
    upstream = Upstream.parse(text)
    assert (upstream.scheme, upstream.socket_path) == ("unix", "/run/vllm.sock")
    assert (upstream.authority, upstream.origin) == (b"localhost", b"http://localhost")
    assert upstream.base_path == b""
    assert upstream.name == "unix:/run/vllm.sock"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with http://"),
        ("gpu1:8000", "begins with http://"),
        ("ftp://gpu1", "begins with http://"),
        ("http:/gpu1", "begins with http://"),
        ("http://", "no usable host"),
        ("http:///v1", "no usable host"),
        ("http://:8000", "no usable host"),
        ("http://a:b:c", "port"),
        ("http://::1", "no usable host"),
        ("http://user:hunter2@gpu1", "no user name or password"),
        ("http://hunter2@gpu1", "no user name or password"),
        ("http://gpu1?x=hunter2", "no query"),
        ("http://gpu1/v1#hunter2", "no fragment"),
        ("http://gpu1:", "port"),
        ("http://gpu1:0", "port"),
        ("http://gpu1:65536", "port"),
        ("http://gpu1:+80", "port"),
        ("http://gpu1:٨٠", "port"),
        ("http://gpu1:8000000000", "port"),
        ("http://gpu 1", "host is not a name"),
        ("http://gpü", "xn--"),
        ("http://a..b", "host is not a name"),
        ("http://-a", "host is not a name"),
        ("http://" + "a" * 64, "host is not a name"),
        ("http://1.2.3", "IP address"),
        ("http://1.2.3.256", "IP address"),
        ("http://[::g]", "IP address"),
        ("http://[fe80::1%25eth0]", "IP address"),
        ("http://[::1", "no usable host"),
        ("http://gpu1\\@evil", "no user name"),
        ("http://gpu1\r\nX: y", "control character"),
        ("http://gpu1/\x00", "control character"),
        ("http://gpu1/\x7f", "control character"),
        ("http://gpu1/a/../b", "dot segment"),
        ("http://gpu1/.", "dot segment"),
        ("http://gpu1/%2e%2E/b", "dot segment"),
        ("http://gpu1/a%2fb", "encoded slash"),
        ("http://gpu1/a%5Cb", "encoded slash"),
        ("http://gpu1/a%00", "encoded slash"),
        ("http://gpu1/a%3bb", "encoded slash"),
        ("http://gpu1/a;b", "percent-encoded"),
        ("http://gpu1/a%2", "percent-encoded"),
        ("http://gpu1/a b", "percent-encoded"),
        ("http://gpu1/é", "percent-encoded"),
        ("http://gpu1//v1", "//"),
        ("http://gpu1//", "//"),
        ("unix:", "absolute path"),
        ("unix:vllm.sock", "absolute path"),
        ("unix://host/vllm.sock", "absolute path"),
        ("unix:///", "absolute path"),
        ("unix:/run/", "absolute path"),
        ("unix:/run/x?db=1", "no query"),
        ("unix:/" + "a" * 107, "107 bytes"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        Upstream.parse(text)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(st.text(alphabet=st.sampled_from("htps:/unix.%2fe[]@?#1a é;\\\n")) | st.text())
def test_whatever_is_accepted_is_safe_to_put_into_a_request(tail: str) -> None:
    for text in (tail, f"http://{tail}", f"http://h/{tail}"):
        try:
            upstream = Upstream.parse(text)
        except ValueError:
            continue
        line = upstream.origin + upstream.authority + upstream.base_path
        assert all(0x20 < byte < 0x7F for byte in line)
        assert not upstream.base_path.endswith(b"/")
        again = Upstream.parse(upstream.name)
        assert again == upstream
