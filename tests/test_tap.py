"""The command line, in memory and as a real ``twistd`` process."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from _asking import until
from twisted.python.usage import UsageError

from vllmproxy.build import VERSION
from vllmproxy.settings import Secret
from vllmproxy.settings_kinds import FLAG
from vllmproxy.settings_table import TABLE
from vllmproxy.tap import Options

TWISTD = str(Path(sysconfig.get_path("scripts"), "twistd"))
CHECKOUT = Path(__file__).resolve().parent.parent
URL = "http://gpu1:8000"


@pytest.fixture(autouse=True)
def _only_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for row in TABLE.values():
        for variable in (*row.environment, "CREDENTIALS_DIRECTORY", "XDG_STATE_HOME"):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def parse(*arguments: str) -> Options:
    options = Options()
    options.parseOptions(list(arguments))
    return options


def twistd(*arguments: str, cwd: Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TWISTD, *arguments],
        cwd=cwd,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sk-a-key\n")
    (tmp_path / "c.toml").write_text("max-head = 1000\nmax-headers = 10\n")
    monkeypatch.setenv("VLLM_API_KEY", "upstream-key")
    settings = parse(
        f"--upstream={URL}/v1",
        *("--listen", "tcp:1", "--listen", "unix:/s", "--trusted-proxy", "10.0.0.0/8"),
        *("--master-key-file", str(tmp_path / "key"), "--config", str(tmp_path / "c.toml")),
        *("--open", "--open-metrics", "--max-headers", "20", "--store=memory:", "--head-timeout", "0.5"),
    ).settings
    assert settings.upstream is not None
    assert settings.upstream.name == f"{URL}/v1"
    assert settings.listen == ("tcp:1", "unix:/s")
    assert [str(network) for network in settings.trusted_proxy] == ["10.0.0.0/8"]
    assert (settings.master_key, settings.upstream_key) == (Secret("sk-a-key"), Secret("upstream-key"))
    assert (settings.open, settings.open_metrics, settings.simulate) == (True, True, False)
    assert (settings.max_head, settings.max_headers, settings.head_timeout) == (1000, 20, 0.5)
    assert settings.state_directory == tmp_path / ".local/state/vllmproxy"


def test_two_parsers_share_nothing() -> None:
    assert parse("--upstream", URL, "--listen", "tcp:1").settings.listen == ("tcp:1",)
    assert parse("--upstream", URL, "--listen", "tcp:2").settings.listen == ("tcp:2",)


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if not row.repeatable])
def test_what_is_given_twice(name: str) -> None:
    if TABLE[name].kind is FLAG:
        base = () if name == "simulate" else ("--upstream", URL)
        assert getattr(parse(*base, f"--{name}", f"--{name}").settings, TABLE[name].field) is True
    else:
        with pytest.raises(UsageError, match=f"--{name} is given twice"):
            parse(f"--{name}=1", f"--{name}=2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--upstream"),
        (("--upstream",), "upstream"),
        (("--simulate=yes",), "simulate"),
        (("--upstream", URL, "start"), "'start' is not an option"),
        (("--nonsense",), "nonsense"),
        (("--upstream", URL, "--max-head", "many"), "--max-head: 'many'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert says in str(caught.value)


def test_version_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vllmproxy {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        ((), {}, "no vLLM server is named"),
        (("--upstream", "http://u:hunter2@h"), {}, "--upstream: "),
        (("--nonsense",), {}, "--nonsense"),
        (("--upstream", URL, "--master-key-file", "absent"), {}, "'absent'"),
        (("--upstream", URL, "--listen", "tcp:x\ny"), {}, "tcp:x"),
        (("--upstream", URL), {"REDIS_URL": "hunter2"}, "environment variable REDIS_URL: "),
    ],
)
def test_twistd_says_a_mistake_in_one_line_and_ends_with_1(
    arguments: tuple[str, ...], environ: Mapping[str, str], says: str, tmp_path: Path
) -> None:
    result = twistd("--nodaemon", "vllmproxy", *arguments, cwd=tmp_path, environ=environ)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"vllmproxy: [^\n]+\n", result.stderr)
    assert says in result.stderr
    assert "hunter2" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("access_log", [(), ("--access-log", "access.jsonl")])
def test_a_daemon_whose_access_log_is_lost_says_so(tmp_path: Path, access_log: Sequence[str]) -> None:
    """It has no standard output, which is the default."""
    options = ("--upstream", URL, "--listen", "unix:socket", "--state-directory", "state", *access_log)
    started = twistd("--pidfile=d.pid", "--logfile=d.log", "vllmproxy", *options, cwd=tmp_path)
    assert started.returncode == 0
    log = tmp_path / "d.log"
    until(lambda: log.exists() and "Listening on unix" in log.read_text())
    os.kill(int((tmp_path / "d.pid").read_text()), signal.SIGTERM)
    until(lambda: not (tmp_path / "d.pid").exists())
    assert ("Nothing is kept of the access log" in log.read_text()) is not bool(access_log)
    assert (tmp_path / "access.jsonl").exists() is bool(access_log)


def test_twistd_help_explains_every_option(tmp_path: Path) -> None:
    result = twistd("vllmproxy", "--help", cwd=tmp_path, environ={"COLUMNS": "200"})
    assert (result.returncode, result.stderr) == (0, "")
    options, examples = result.stdout.split("\nExamples:\n")
    entries = dict(re.findall(r"(?ms)^ +--([a-z-]+)=? +(.*?)(?=^ +--|\n\n)", options))
    assert set(entries) == {*TABLE, "config", "help", "version"}
    for row in TABLE.values():
        text = " ".join(entries[row.name].split())
        assert row.help in text
        assert (row.default or "") in text
        assert [name for name in row.environment if name not in text] == []
    assert "twistd --nodaemon vllmproxy --upstream http://gpu1:8000" in examples


def test_twistd_version(tmp_path: Path) -> None:
    result = twistd("vllmproxy", "--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"vllmproxy {VERSION}\n", "")


@pytest.mark.parametrize("in_checkout", [True, False])
def test_twistd_lists_both_commands_once(in_checkout: bool, tmp_path: Path) -> None:
    result = twistd("--help", cwd=CHECKOUT if in_checkout else tmp_path)
    listed = re.findall(r"(?m)^    (vllm\w+) ", result.stdout)
    assert (result.returncode, sorted(listed)) == (0, ["vllmproxy", "vllmsim"])


def test_the_reactor_is_left_for_twistd_to_choose() -> None:
    check = (
        "import sys; from vllmproxy.tap import Options; options = Options();"
        f"options.parseOptions(['--upstream', '{URL}', '--listen', 'tcp:1', '--listen', 'tcp6:1']);"
        "sys.exit('twisted.internet.reactor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
