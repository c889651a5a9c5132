"""How a command fails: one sentence, an exit status, never a traceback, never a key."""

import os
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from _cli import SECONDS, Said, command, environment, fake_server, running, vllmproxy
from _ports import free_port
from _service import MASTER_KEY

LIST = ("keys", "list")
NO_KEYS = Said({"keys": [], "total_count": 0, "current_page": 1, "total_pages": 0})


@contextmanager
def raw_server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run ``serve`` on each connection, until the client leaves."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def drip(connection: socket.socket) -> None:
    """Answer a byte at a time, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    gone = threading.Event()
    while not gone.wait(0.05):
        connection.sendall(b" ")


def silence(connection: socket.socket) -> None:
    while connection.recv(65_536):
        pass


def test_the_proxy_does_not_run(tmp_path: Path) -> None:
    port = free_port()
    assert vllmproxy(*LIST, url=f"http://127.0.0.1:{port}").failure == (
        f"Cannot connect to http://127.0.0.1:{port} (Connection refused); is the proxy running? "
        "Check --url or VLLMPROXY_URL."
    )
    assert "(No such file or directory)" in vllmproxy(*LIST, url=f"unix:{tmp_path}/none").failure
    assert "Cannot connect to http://nowhere.invalid:1" in vllmproxy(*LIST, url="http://nowhere.invalid:1").failure


@pytest.mark.parametrize(
    "said",
    [
        Said(b"<html>Welcome</html>", content_type="text/html"),
        Said(b"", status=502),
        Said(b"[" * 100_000),
        Said([]),
        Said({"detail": "Not Found"}, status=404),
        Said({"error": "no"}, status=500),
        Said({"error": {"message": ""}}, status=500),
        Said(b"", status=302),
    ],
)
def test_another_server(said: Said) -> None:
    with fake_server(lambda asked: said) as server:
        failure = vllmproxy(*LIST, url=server.url).failure
    assert failure.startswith(f"{server.url} answers with status {said.status} and nothing that vllmproxy would say")
    assert len(server.asked) == 1


@pytest.mark.parametrize("keys", [None, [1], [{}], {"a": 1}, [{"token": 5}]])
def test_a_listing_that_is_none(keys: Any) -> None:
    with fake_server(lambda asked: Said({"keys": keys, "total_pages": 1})) as server:
        assert "does not answer as vllmproxy does" in vllmproxy(*LIST, url=server.url).failure


def test_an_endless_listing_ends_with_its_first_empty_page() -> None:
    with fake_server(lambda asked: Said({"keys": [], "total_pages": 10**9})) as server:
        assert vllmproxy(*LIST, url=server.url).out == "There are no keys.\n"


def test_a_server_that_repeats_the_key_does_not_have_it_shown() -> None:
    evil = f"Your key {MASTER_KEY} is bad,\x1b[2J and so is sk-another-0123456789."
    with fake_server(lambda asked: Said({"error": {"message": evil}}, status=400)) as server:
        failure = vllmproxy(*LIST, url=server.url).failure
        assert failure == "Your key ... is bad,\\x1b[2J and so is sk-..."
        assert server.asked[0].headers["authorization"] == f"Bearer {MASTER_KEY}"


def test_no_other_proxy_is_asked() -> None:
    with fake_server(lambda asked: NO_KEYS) as server:
        proxies = {
            "HTTP_PROXY": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
            "ALL_PROXY": "http://127.0.0.1:9",
        }
        assert vllmproxy(*LIST, url=server.url, **proxies).status == 0


def test_a_server_that_speaks_no_http() -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"220 mail ESMTP\r\n")
        connection.recv(65_536)  # what is unread when it is closed would make a reset of the close

    with raw_server(serve) as url:
        assert "does not speak HTTP" in vllmproxy(*LIST, url=url).failure


def test_an_answer_that_breaks_off() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}")

    with raw_server(serve) as url:
        assert "ended its answer early" in vllmproxy(*LIST, url=url).failure


@pytest.mark.parametrize("serve", [silence, drip])
def test_every_call_has_a_deadline(serve: Callable[[socket.socket], None]) -> None:
    with raw_server(serve) as url:
        assert "did not answer within 0.5 s" in vllmproxy(*LIST, "--timeout", "0.5", url=url).failure


def test_a_change_that_was_not_answered_in_time_is_in_doubt() -> None:
    with raw_server(silence) as url:
        assert "may have done it all the same" in vllmproxy("keys", "create", "--timeout", "0.5", url=url).failure


def test_an_answer_without_end() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 1_048_576)

    with raw_server(serve) as url:
        assert "sent more than 67108864 bytes" in vllmproxy(*LIST, url=url).failure


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def serving(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_certificates_are_verified(authority: trustme.CA, certificate: str) -> None:
    with fake_server(lambda asked: NO_KEYS, serving(authority, "127.0.0.1")) as server:
        unknown = vllmproxy(*LIST, url=server.url).failure
        assert unknown.startswith(f"The certificate of {server.url} is not good (")
        assert unknown.endswith("name the authority to trust with --ca FILE.")
        assert not server.asked
        assert vllmproxy(*LIST, "--ca", certificate, url=server.url).out == "There are no keys.\n"
    with fake_server(lambda asked: NO_KEYS, serving(authority, "elsewhere.example")) as server:
        assert "is not good (" in vllmproxy(*LIST, "--ca", certificate, url=server.url).failure
        assert not server.asked


def test_tls_on_one_side_only(authority: trustme.CA, certificate: str) -> None:
    with fake_server(lambda asked: NO_KEYS) as server:
        url = server.url.replace("http:", "https:")
        assert vllmproxy(*LIST, url=url).failure.startswith(f"No TLS with {url} came about")
    with fake_server(lambda asked: NO_KEYS, serving(authority, "127.0.0.1")) as server:
        assert vllmproxy(*LIST, url=server.url.replace("https:", "http:")).status == 1


def test_authorities_that_cannot_be_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("nothing")
    for file in (empty, tmp_path / "none", tmp_path):
        failure = vllmproxy(*LIST, "--ca", str(file), url="https://127.0.0.1:9").failure
        assert failure.startswith("--ca: ")
        assert str(file) in failure


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with fake_server(lambda asked: NO_KEYS) as server:
        done = _to(writing, *LIST, url=server.url)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_one() -> None:
    with fake_server(lambda asked: NO_KEYS) as server, open("/dev/full", "wb") as full:
        done = _to(full.fileno(), *LIST, url=server.url)
    assert done.returncode == 1
    assert done.stderr == b"vllmproxy: Cannot write to standard output: No space left on device.\n"


def test_the_help_is_for_head_too() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = _to(writing, "--help", url="http://127.0.0.1:9")
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def _to(out: int, *arguments: str, url: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        command(*arguments),
        env=environment(url),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.PIPE,
        timeout=SECONDS,
        check=False,
    )


def test_ctrl_c() -> None:
    asked = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(65_536)
        asked.set()
        silence(connection)

    with raw_server(serve) as url, running(*LIST, url=url) as process:
        assert asked.wait(SECONDS)
        for _ in range(3):  # Python loses an interrupt that comes while it is in a finalizer: one presses again
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS / 4)
                break
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, err) == (130, b"", b"")


def test_a_terminal_that_is_not_utf_8() -> None:
    row = {"token": "a" * 64, "key_alias": "日本", "key_name": "sk-...aaaa"}
    with fake_server(lambda asked: Said({"keys": [row], "total_pages": 1})) as server:
        shown = vllmproxy(*LIST, url=server.url, PYTHONIOENCODING="ascii")
    assert shown.status == 0
    assert "\\u65e5\\u672c" in shown.out
