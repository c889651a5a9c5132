"""The compiled build is held to the same tests, but for those that put something else in the place of a part of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
#: Files whose tests hand compiled code stand-ins, exchange its functions or constants, or ask attrs about its values.
INTERPRETED = """
    budgets_contract compiled compiled_service costs garbage http1_agent http1_templates inspection_alike keys_gate
    limits_accounts limits_ahead limits_behind limits_fallback observers_jsonlines observers_metrics relay_admission
    relay_alike relay_exchange relay_line relay_revocation relay_states relay_waits store_usage_contract
    store_usage_sqlite upstreams_probe usage_bookkeeper usage_event
"""
BIN = Path(sys.executable).parent


def run(program: str, *options: str, seconds: float, **environment: str) -> str:
    command = (str(BIN / program), *options)
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.long
def test_the_compiled_build_passes(tmp_path: Path) -> None:
    wheel = ("wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), ".")
    run("pip", *wheel, seconds=1800, HATCH_BUILD_HOOK_ENABLE_CUSTOM="1")
    (built,) = tmp_path.glob("*.whl")
    run("pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(built), seconds=60)
    where = {"PYTHONPATH": str(tmp_path / "site")}
    assert "(compiled)" in run("twistd", "vllmproxy", "--version", seconds=60, **where)
    ignored = [f"--ignore=tests/test_{name}.py" for name in INTERPRETED.split()]
    # Not python -m pytest, which looks into the checkout first.
    run("pytest", "-n", "auto", "--dist", "loadfile", "-q", *ignored, seconds=1800, **where)
