"""``twistd vllmsim``: a vLLM that needs no GPU."""

from pathlib import Path
from typing import Any

from twisted.application.service import Service
from twisted.internet import endpoints, reactor
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.python import usage

from vllmproxy import __version__
from vllmproxy.listening import CannotListen, Listener, accept, listen
from vllmproxy.simulator.config import DEFAULT_MODEL, SimulatorConfig
from vllmproxy.simulator.server import SimulatorFactory


def _seconds(value: str) -> float:
    """Seconds: a number, 0 or more."""
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError("must be seconds, 0 or more")
    return number


class Options(usage.Options):
    """The command line of the simulated vLLM.

    :ivar config: what the options mean, once they have been validated.
    """

    synopsis = "[options]"
    longdesc = (
        "Answers as vLLM's OpenAI-compatible server does, with made-up text. What it should do wrong is asked "
        "for by request, in the header X-Vllmsim; what it counted is at GET /vllmsim/stats."
    )
    optParameters = [
        ["listen", None, "tcp:8000:interface=127.0.0.1", "Where to listen: a Twisted endpoint."],
        ["model", None, DEFAULT_MODEL, "The name of the one model it serves."],
        ["ttft", None, 0.05, "Seconds to the first token.", _seconds],
        ["tpot", None, 0.02, "Seconds between one token and the next.", _seconds],
        [
            "tokens",
            None,
            None,
            "How long an answer is before it stops by itself (default: what max_tokens allows).",
            int,
        ],
        ["keep-alive", None, 5.0, "Seconds after which an idle connection is closed.", _seconds],
        ["api-key-file", None, None, "A file with the key to ask for, as vLLM's --api-key does."],
    ]

    config: SimulatorConfig

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"vllmsim {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """Turn the options into a :class:`SimulatorConfig`, or raise ``UsageError``."""
        try:
            endpoints.serverFromString(reactor, self["listen"])
        except (ValueError, TypeError, KeyError, IndexError) as reason:
            raise usage.UsageError(f"--listen {self['listen']}: {reason}") from None
        if not self["model"]:
            raise usage.UsageError("--model must not be empty")
        if self["tokens"] is not None and self["tokens"] < 1:
            raise usage.UsageError("--tokens must be at least 1")
        self.config = SimulatorConfig(
            model=self["model"],
            ttft=self["ttft"],
            tpot=self["tpot"],
            keep_alive=self["keep-alive"],
            answer_tokens=self["tokens"],
            api_key=self._api_key(),
        )

    def _api_key(self) -> str | None:
        if self["api-key-file"] is None:
            return None
        try:
            key = Path(self["api-key-file"]).read_text().strip()
        except (OSError, UnicodeDecodeError) as reason:
            raise usage.UsageError(f"--api-key-file: {reason}") from None
        if not key:
            raise usage.UsageError(f"--api-key-file {self['api-key-file']}: the file is empty")
        return key


class _Listening(Service):
    """Listens while it runs."""

    def __init__(self, description: str, factory: SimulatorFactory) -> None:
        self._description = description
        self._factory = factory
        self._listeners: list[Listener] = []

    def privilegedStartService(self) -> None:
        """Bind; a port that is taken ends ``twistd`` with one line and status 1."""
        try:
            self._listeners = listen(reactor, [self._description], self._factory)
        except CannotListen as error:
            raise SystemExit(f"vllmsim: {error}") from None
        accept(self._listeners)

    def stopService(self) -> Deferred[Any]:
        """Stop listening, which ends every connection."""
        return gatherResults([maybeDeferred(each.port.stopListening) for each in self._listeners])


def makeService(options: Options) -> Service:
    """Return the service that listens."""
    return _Listening(options["listen"], SimulatorFactory(reactor, options.config))
