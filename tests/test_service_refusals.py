"""Starting when something is wrong: status 1, one line that says what, never a process that listens on nothing."""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from _ports import free_port
from _redis import redis_server
from _service import MASTER_KEY, START_SECONDS, Twistd, run, start

KEY = {"VLLMPROXY_MASTER_KEY": MASTER_KEY}
UPSTREAM = ("--upstream", "http://127.0.0.1:9")


def refused(directory: Path, *arguments: str, env: dict[str, str] | None = None, listen: bool = True) -> str:
    """Start a proxy that must not start, and return the line that it ends with."""
    options = ("--listen", f"tcp:{free_port()}:interface=127.0.0.1") if listen else ()
    process = run(directory, "vllmproxy", *options, *arguments, env=KEY if env is None else env)
    try:
        status = process.wait(START_SECONDS)
    finally:
        process.kill()
        process.wait()
    output = _all(directory)
    assert "Traceback" not in output
    assert status == 1, output
    lines = output.splitlines(keepends=True)
    (reason,) = [line for line in lines if re.match(r"(\S+ \[stderr#error\] )?vllmproxy: ", line)]
    assert reason == lines[-1]
    assert reason.endswith("\n")  # whoever writes next to the terminal begins a line
    return reason


def test_a_busy_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path, *UPSTREAM, "--listen", f"tcp:{port}:interface=127.0.0.1", listen=False)
    assert str(port) in line
    assert "in use; stop what listens there (ss -ltnp shows it), or choose another port" in line


def test_a_busy_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    (tmp_path / "proxy.sock.lock").symlink_to(str(os.getpid()))  # Twisted's lock: whose it is
    line = refused(tmp_path, *UPSTREAM, "--listen", f"unix:{path}", listen=False)
    assert f"another process listens there, or {path}.lock would be gone; stop it, or choose another path" in line


def test_a_unix_socket_where_there_is_no_directory(tmp_path: Path) -> None:
    line = refused(tmp_path, *UPSTREAM, "--listen", f"unix:{tmp_path}/no/proxy.sock", listen=False)
    assert "No such file or directory; make its directory, or choose another path" in line


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    line = refused(tmp_path, *UPSTREAM, "--listen", f"tcp:{free_port()}:interface=192.0.2.1", listen=False)
    assert "Cannot assign requested address; name one of this machine" in line


@pytest.mark.parametrize("which", ["name=http", "index=0"])
def test_a_socket_that_systemd_did_not_hand_over(tmp_path: Path, which: str) -> None:
    line = refused(tmp_path, *UPSTREAM, "--listen", f"systemd:domain=INET:{which}", listen=False)
    assert "systemd handed over no socket of that name or number and domain" in line
    assert "vllmproxy.socket" in line


def test_one_busy_port_of_two(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(tmp_path, *UPSTREAM, "--listen", f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1")


def test_a_file_that_is_no_sqlite(tmp_path: Path) -> None:
    (tmp_path / "keys.sqlite3").write_bytes(b"this is something else\n" * 100)
    line = refused(tmp_path, *UPSTREAM, "--store", f"sqlite:{tmp_path}/keys.sqlite3")
    assert f"{tmp_path}/keys.sqlite3" in line
    assert (tmp_path / "keys.sqlite3").read_bytes() == b"this is something else\n" * 100


def test_a_store_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "keys.sqlite3").mkdir()
    assert f"{tmp_path}/keys.sqlite3" in refused(tmp_path, *UPSTREAM, "--store", f"sqlite:{tmp_path}/keys.sqlite3")


def test_a_place_for_the_store_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    named = refused(tmp_path / "a", *UPSTREAM, "--store", f"sqlite:{tmp_path}/file/keys.sqlite3")
    assert f"--store: {tmp_path}/file/keys.sqlite3 cannot be created" in named
    place = ("--state-directory", f"{tmp_path}/file/state")
    named = refused(tmp_path / "b", *UPSTREAM, *place)
    assert f"--state-directory: {tmp_path}/file/state/vllmproxy.sqlite cannot be created" in named
    with redis_server() as redis:
        named = refused(tmp_path / "d", *UPSTREAM, *place, "--store", redis.url)
    assert "--state-directory: the journal of usage cannot be written: " in named
    simulated = refused(tmp_path / "c", "--simulate", "--state-directory", f"{tmp_path}/file/state", env={})
    assert "file" in simulated


def test_a_redis_that_is_not_there(tmp_path: Path) -> None:
    port = free_port()
    line = refused(tmp_path, *UPSTREAM, "--store", f"redis://someone:a-secret-word@127.0.0.1:{port}/0")
    assert f"--store: redis://127.0.0.1:{port}/0: " in line
    assert "refused" in line
    assert "a-secret-word" not in _all(tmp_path)


def test_a_redis_that_wants_another_password(tmp_path: Path) -> None:
    with redis_server("--requirepass", "right-one") as redis:
        url = f"redis://:a-secret-word@127.0.0.1:{redis.port}/0"
        assert str(redis.port) in refused(tmp_path, *UPSTREAM, "--store", url)
    assert "a-secret-word" not in _all(tmp_path)


def test_a_redis_that_never_answers(tmp_path: Path) -> None:
    with redis_server() as redis:
        redis.stall()
        assert str(redis.port) in refused(tmp_path, *UPSTREAM, "--store", redis.url)


def test_a_redis_with_another_schema(tmp_path: Path) -> None:
    with redis_server() as redis:
        redis.command("SET", "vllmproxy:schema", "999")
        assert "999" in refused(tmp_path, *UPSTREAM, "--store", redis.url)


@pytest.mark.parametrize("kind", ["ssl", "tls"])
@pytest.mark.parametrize("content", [None, "this is no certificate\n"])
def test_a_bad_certificate(tmp_path: Path, kind: str, content: str | None) -> None:
    pem = tmp_path / "server.pem"
    if content is not None:
        pem.write_text(content)
    endpoint = f"{kind}:{free_port()}:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    line = refused(tmp_path, *UPSTREAM, "--listen", endpoint, listen=False)
    assert f": privateKey='{pem}' " in line
    assert ("cannot be read (No such file or directory)" if content is None else "holds no private key") in line


def test_a_certificate_with_another_s_key(tmp_path: Path) -> None:
    pem = tmp_path / "server.pem"
    one, other = (trustme.CA().issue_cert("localhost") for _ in range(2))
    pem.write_bytes(one.private_key_pem.bytes() + other.cert_chain_pems[0].bytes())
    endpoint = f"ssl:{free_port()}:interface=127.0.0.1:privateKey={pem}:certKey={pem}"
    assert "keys do not match" in refused(tmp_path, *UPSTREAM, "--listen", endpoint, listen=False)


@pytest.mark.parametrize("option", ["--master-key-file", "--upstream-key-file"])
@pytest.mark.parametrize("kind", ["missing", "a directory", "empty", "binary"])
def test_a_key_file_that_cannot_be_read(tmp_path: Path, option: str, kind: str) -> None:
    file = tmp_path / "the-key"
    if kind == "a directory":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else b"\xff\xfe\x00sk-\x00")
    line = refused(tmp_path, *UPSTREAM, option, str(file), env={})
    assert option in line
    assert "the-key" in line


def test_no_upstream(tmp_path: Path) -> None:
    line = refused(tmp_path)
    assert "--upstream" in line
    assert "HOSTED_VLLM_API_BASE" in line


def test_an_access_log_that_cannot_be_written(tmp_path: Path) -> None:
    assert "no/such" in refused(tmp_path, *UPSTREAM, "--access-log", f"{tmp_path}/no/such/access.jsonl")


# with workers


def test_a_store_that_workers_cannot_share(tmp_path: Path) -> None:
    line = refused(tmp_path, *UPSTREAM, "--workers", "2", "--store", "memory:")
    assert "--workers: 2 processes need a store that they share, and memory: is one process's" in line


def test_workers_that_cannot_start_say_so_once(tmp_path: Path) -> None:
    port = free_port()
    store = ("--workers", "2", "--store", f"redis://127.0.0.1:{port}/0")
    line = refused(tmp_path / "a", *UPSTREAM, *store)
    assert f"127.0.0.1:{port}" in line
    assert "refused" in line
    assert "no/such" in refused(tmp_path / "b", *UPSTREAM, *store, "--access-log", f"{tmp_path}/no/such/access.jsonl")
    assert "another is started" not in (tmp_path / "a" / "out").read_text()


def test_a_busy_port_and_auth_that_is_off_are_the_parent_s_business(tmp_path: Path) -> None:
    store = ("--workers", "2", "--store", f"redis://127.0.0.1:{free_port()}/0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path / "a", *UPSTREAM, *store, "--listen", f"tcp:{port}:interface=127.0.0.1", listen=False)
    assert "in use" in line
    line = refused(tmp_path / "b", *UPSTREAM, *store, "--listen", f"tcp:{port}", env={}, listen=False)
    assert "--master-key-file" in line


# who can reach it


def test_auth_is_not_off_for_other_machines(tmp_path: Path) -> None:
    port = free_port()
    line = refused(tmp_path, *UPSTREAM, "--listen", f"tcp:{port}", env={}, listen=False)
    assert f"0.0.0.0:{port}" in line
    assert "--master-key-file" in line
    assert "--open" in line


def test_one_listener_that_others_reach_is_enough_to_refuse(tmp_path: Path) -> None:
    assert "0.0.0.0" in refused(tmp_path, *UPSTREAM, "--listen", f"tcp:{free_port()}:interface=0.0.0.0", env={})


@pytest.mark.parametrize("key", ["sk-1234", "tiny-one"])
def test_a_weak_master_key_is_refused_where_others_reach_it(tmp_path: Path, key: str) -> None:
    env = {"LITELLM_MASTER_KEY": key}
    for name, options in (("a", ()), ("b", ("--open",))):
        line = refused(tmp_path / name, *UPSTREAM, "--listen", f"tcp:{free_port()}", *options, env=env, listen=False)
        assert "master key" in line
        assert key not in _all(tmp_path / name)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Twistd]]:
    services: list[Twistd] = []
    yield services
    for service in services:
        service.stop()


def test_open_is_allowed_when_asked_for_with_a_warning(tmp_path: Path, started: list[Twistd], sim: Twistd) -> None:
    port = free_port()
    options = ("--upstream", sim.url, "--listen", f"tcp:{port}", "--open")
    service = start(tmp_path, "vllmproxy", *options, port=port)
    started.append(service)
    assert isinstance(service.get_json("/vllm/v1/models"), dict)
    assert "AUTH IS OFF" in service.log


def test_auth_off_and_a_weak_key_on_loopback_are_warnings(tmp_path: Path, started: list[Twistd], sim: Twistd) -> None:
    for env, words in (({}, "Auth is off"), ({"LITELLM_MASTER_KEY": "sk-1234"}, "master key")):
        port = free_port()
        listen = ("--listen", f"tcp:{port}:interface=127.0.0.1")
        service = start(tmp_path / words, "vllmproxy", "--upstream", sim.url, *listen, port=port, env=env)
        started.append(service)
        answer = service.get_json("/vllm/v1/models", headers={"Authorization": "Bearer sk-1234"})
        assert isinstance(answer, dict)
        assert answer["object"] == "list"
        (warning,) = [line for line in service.log.splitlines() if "#warn" in line]
        assert words in warning
        assert "sk-1234" not in service.log


def test_a_master_key_that_is_there_and_not_used_is_told_of(tmp_path: Path, started: list[Twistd], sim: Twistd) -> None:
    kept = tmp_path / "state" / "master-key"
    kept.parent.mkdir()
    kept.write_text("sk-made-when-it-was-tried-out")
    port = free_port()
    options = ("--listen", f"tcp:{port}:interface=127.0.0.1", "--state-directory", str(kept.parent))
    env = {
        "VLLMPROXY_UPSTRAEM": sim.url,
        "VLLMPROXY_DRAIN_TIMEOUT": "5",
        "VLLMPROXY_URL": "http://127.0.0.1:1",
        "VLLMPROXY_PORT": "tcp://x:1",
    }
    service = start(tmp_path / "proxy", "vllmproxy", "--upstream", sim.url, *options, port=port, env=env)
    started.append(service)
    warnings = [line.partition("] ")[2] for line in service.log.splitlines() if "#warn" in line]
    assert warnings == [
        "The variable 'VLLMPROXY_DRAIN_TIMEOUT' sets nothing; most settings have none: use options, or --config",
        "The variable 'VLLMPROXY_UPSTRAEM' sets nothing; did you mean VLLMPROXY_UPSTREAM?",
        "Auth is off: there is no master key, so everybody on this machine may call vLLM.",
        f"There is a master key in {kept}, which is not used: give --master-key-file {kept}",
    ]


def _all(directory: Path) -> str:
    return (directory / "out").read_text() + (directory / "err").read_text()
