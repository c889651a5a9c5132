"""``twistd vllmsim``: its options and its service."""

from pathlib import Path

import pytest
import pytest_twisted
from twisted.application.service import Service
from twisted.internet import reactor
from twisted.python.usage import UsageError

from vllmproxy.simulator import tap
from vllmproxy.simulator.config import SimulatorConfig
from vllmproxy.simulator.server import SimulatorFactory


def options(*arguments: str) -> tap.Options:
    parsed = tap.Options()
    parsed.parseOptions(list(arguments))
    return parsed


def test_the_defaults() -> None:
    parsed = options()
    assert parsed["listen"] == "tcp:8000:interface=127.0.0.1"
    assert parsed.config == SimulatorConfig(ttft=0.05, tpot=0.02)


def test_every_option_reaches_the_configuration(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = ("--model", "m", "--ttft", "1", "--tpot", "0", "--keep-alive", "9", "--tokens", "7")
    config = options(*given, "--api-key-file", str(key)).config
    assert config == SimulatorConfig(model="m", ttft=1.0, tpot=0.0, keep_alive=9.0, answer_tokens=7, api_key="secret")
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--listen", "nonsense:1"),
        ("--listen", "tcp:port"),
        ("--listen", ""),
        ("--ttft", "-1"),
        ("--tpot", "nan"),
        ("--keep-alive", "soon"),
        ("--tokens", "0"),
        ("--model", ""),
        ("--api-key-file", "/no/such/file"),
        ("--api-key-file", "/dev/null"),
    ],
)
def test_a_mistake_is_one_clear_error(arguments: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as error:
        options(*arguments)
    assert str(error.value)


@pytest_twisted.ensureDeferred
async def test_a_port_that_is_taken_stops_the_start() -> None:
    port = reactor.listenTCP(0, SimulatorFactory(reactor), interface="127.0.0.1")  # type: ignore[attr-defined]
    number = port.getHost().port
    try:
        service = tap.makeService(options("--listen", f"tcp:{number}:interface=127.0.0.1"))
        assert isinstance(service, Service)
        with pytest.raises(SystemExit, match=r"vllmsim: cannot listen on .*: Address already in use"):
            service.privilegedStartService()
    finally:
        await port.stopListening()
