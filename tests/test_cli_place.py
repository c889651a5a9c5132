"""Where the proxy is, and with what key, out of options and environment."""

from argparse import Namespace
from pathlib import Path

import pytest

from vllmproxy.cli.errors import CommandError
from vllmproxy.cli.place import Place, find_place

KEY = "sk-0123456789abcdef"


def place(environ: dict[str, str] | None = None, **options: object) -> Place:
    given: dict[str, object] = {"url": None, "key_file": None, "ca": None, "timeout": 30.0}
    return find_place(Namespace(**given | options), environ or {})


def refused(environ: dict[str, str] | None = None, **options: object) -> str:
    with pytest.raises(CommandError) as caught:
        place(environ, **options)
    return str(caught.value)


def test_the_option_counts_before_the_environment_and_that_before_the_default() -> None:
    environ = {"VLLMPROXY_URL": "http://there:1"}
    assert place(environ, url="http://here:2").name == "http://here:2"
    assert place(environ).name == "http://there:1"
    assert place({"VLLMPROXY_URL": ""}).name == place().name == "http://127.0.0.1:4000"


def test_a_unix_socket() -> None:
    found = place(url="unix:/run/vllmproxy/http")
    assert (found.socket, str(found.url), found.name) == (
        "/run/vllmproxy/http",
        "http://localhost",
        "unix:/run/vllmproxy/http",
    )


@pytest.mark.parametrize(
    "url",
    [
        "gpu1:4000",
        "ftp://gpu1",
        "http://",
        "http://gpu1:port",
        "http://gpu1/?a",
        "http://gpu1/#a",
        "unix:relative",
        "http://\x1b",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    assert refused(url=url).startswith("--url: ")
    assert refused({"VLLMPROXY_URL": url}).startswith("VLLMPROXY_URL: ")


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    assert "hunter2" not in refused(url="http://me:hunter2@gpu1:4000")


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    environ = {"VLLMPROXY_MASTER_KEY": "sk-ours", "LITELLM_MASTER_KEY": "sk-theirs"}
    assert place(environ, key_file=str(file)).key == KEY
    assert place(environ).key == "sk-ours"
    assert place({"VLLMPROXY_MASTER_KEY": "", "LITELLM_MASTER_KEY": "sk-theirs"}).key == "sk-theirs"
    assert place().key is None
    assert KEY not in repr(place(key_file=str(file)))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"sk-a\nsk-b\n", b"sk-\x1b", "sk-é".encode(), b"\xff\xfe"]
)
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    message = refused(key_file=str(file))
    assert message.startswith("--key-file: ")
    assert not content.strip() or content.decode("latin-1").strip() not in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused(key_file=str(tmp_path / "none"))
    assert str(tmp_path) in refused(key_file=str(tmp_path))
