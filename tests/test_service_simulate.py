"""The first run: ``twistd --nodaemon vllmproxy --simulate``, and the lines that it tells a person to try."""

import json
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import ask, until
from _ports import free_port
from _service import START_SECONDS, Twistd, run


def first_run(directory: Path) -> Twistd:
    port = free_port()
    process = run(directory, "vllmproxy", "--simulate", "--listen", f"tcp:{port}:interface=127.0.0.1")
    service = Twistd(process, port, directory)
    until(lambda: "/key/generate" in service.log or process.poll() is not None, START_SECONDS)
    return service


@pytest.fixture(params=["plain", "with a space and 'quotes'"])
def simulated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Twistd]:
    service = first_run(tmp_path / request.param)
    yield service
    service.stop()
    assert "Traceback" not in service.log


def key_file(service: Twistd) -> Path:
    return service.directory / "state" / "vllmproxy" / "master-key"


def to_try(service: Twistd) -> list[str]:
    """The commands as they are printed: from each ``curl`` to the end of its lines."""
    commands: list[str] = []
    continued = False
    for line in service.log.splitlines():
        if continued:
            commands[-1] += "\n" + line
        elif line.lstrip().startswith("curl "):
            commands.append(line)
        else:
            continue
        continued = line.endswith("\\")
    return commands


def test_what_it_prints_works_in_a_shell_as_it_is_printed(simulated: Twistd) -> None:
    assert shutil.which("curl"), "curl is what the page calls"
    answers = [
        subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True, cwd="/").stdout
        for command in to_try(simulated)
    ]
    assert any(answer.startswith("# HELP vllm:") for answer in answers)
    assert any('"chat.completion"' in answer and json.loads(answer)["usage"] for answer in answers)
    (streamed,) = [answer for answer in answers if answer.rstrip().endswith("data: [DONE]")]
    assert streamed.count("data: ") > 5
    (made,) = [json.loads(answer) for answer in answers if '"token_id"' in answer]
    assert ask(simulated, "GET", "/vllm/v1/models", key=made["key"]).status == 200


def test_the_whole_text_can_be_pasted(simulated: Twistd) -> None:
    text = simulated.log[simulated.log.index("  curl ") :].split("\n\n\n")[0]
    lines = [line for line in text.splitlines() if not line[:1].isdigit()]  # log lines begin with the time
    done = subprocess.run(["sh", "-e"], input="\n".join(lines), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "data: [DONE]" in done.stdout


def test_its_master_key_is_for_its_owner_and_never_printed(simulated: Twistd) -> None:
    file = key_file(simulated)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = file.read_text().strip()
    assert len(key) >= 20
    assert "master-key" in simulated.log  # the path is
    assert key not in simulated.log
    assert ask(simulated, "GET", "/vllm/v1/models", key=key).status == 200
    assert ask(simulated, "GET", "/vllm/v1/models").status == 401
    simulated.stop()
    assert key not in simulated.log


def test_a_second_run_finds_the_key_of_the_first(tmp_path: Path) -> None:
    keys = []
    for end in (signal.SIGTERM, signal.SIGINT):
        service = first_run(tmp_path / "home")
        keys.append(key_file(service).read_text())
        assert ask(service, "GET", "/vllm/v1/models", key=keys[-1].strip()).status == 200
        service.stop(end)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("kept", ["", "\n", "two words\n", "sk-kept-from-before-0001\n"])
def test_a_key_that_is_there_already_opens_or_is_said_to_be_no_good(tmp_path: Path, kept: str) -> None:
    """A first run that was interrupted can leave an empty file, and a person can write anything there."""
    file = tmp_path / "state" / "vllmproxy" / "master-key"
    file.parent.mkdir(parents=True)
    file.write_text(kept)
    service = first_run(tmp_path)
    try:
        if service.process.poll() is None:
            for shown in ("", " ", "anything"):
                headers = {"Authorization": f"Bearer {shown}"}
                assert ask(service, "GET", "/vllm/v1/models", headers=headers).status == 401
            assert ask(service, "GET", "/vllm/v1/models", key=file.read_text().strip()).status == 200
        else:
            assert service.process.returncode == 1
            assert str(file) in service.log
    finally:
        service.stop()
    assert "Traceback" not in service.log
