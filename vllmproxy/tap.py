"""What ``twistd vllmproxy`` takes, and the service it becomes."""

import os
from collections.abc import Sequence
from typing import Any, Final

from twisted.application.service import IService
from twisted.logger import Logger
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from vllmproxy.build import VERSION
from vllmproxy.near import nearest
from vllmproxy.said import Said, read_now
from vllmproxy.settings import Settings, SettingsError
from vllmproxy.settings_kinds import FLAG
from vllmproxy.settings_table import TABLE, Row

_log = Logger(namespace=__name__)

#: How the variables begin that are ours alone, and those that there are, of the command line too.
_PREFIX: Final = "VLLMPROXY_"
_VARIABLES: Final = frozenset({"VLLMPROXY_URL", *(name for row in TABLE.values() for name in row.environment)})

#: What Kubernetes sets for a service that is called as we are.
_KUBERNETES: Final = (f"{_PREFIX}PORT", f"{_PREFIX}SERVICE_")

_EXAMPLES = """
Examples:
  twistd --nodaemon vllmproxy --simulate
  twistd --nodaemon vllmproxy --upstream http://gpu1:8000
  twistd --nodaemon vllmproxy --upstream http://gpu1:8000 \\
      --listen tcp:4000 --master-key-file /etc/vllmproxy/master-key
  HOSTED_VLLM_API_BASE=http://gpu1:8000 twistd --nodaemon vllmproxy

An option counts before the environment, the environment before the file.
"""


class Options(UsageOptions):
    """The command line. After parsing, ``settings`` holds what everything else is built from, and ``said`` what they
    were built from."""

    longdesc = "A transparent gateway in front of vLLM."
    settings: Settings
    said: Said

    def opt_config(self, path: str) -> None:
        """TOML FILE with settings under the names of these options."""
        self.take("config", path)

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"vllmproxy {VERSION}")
        raise SystemExit(0)

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse. Under twistd a mistake ends the process with one line; twistd would print all options."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]  # Twisted has no type here
        except UsageError as error:
            if self.parent is None:
                raise
            raise SystemExit(f"vllmproxy: {error}") from None

    def parseArgs(self, *extra: str) -> None:
        """Refuse whatever is not an option."""
        if extra:
            raise UsageError(f"{extra[0]!r} is not an option; see twistd vllmproxy --help")

    def postOptions(self) -> None:
        """Make ``settings``. Raises ``UsageError`` with one sentence."""
        try:
            self.said, self.settings = self.read()
        except SettingsError as error:
            raise UsageError(str(error)) from None

    def warn(self) -> None:
        """Tell the log of what was asked for and cannot be."""
        known = {name.removeprefix(_PREFIX) for name in _VARIABLES}
        for name in sorted(os.environ):
            if name.startswith(_PREFIX) and name not in _VARIABLES and not name.startswith(_KUBERNETES):
                near = nearest(name.removeprefix(_PREFIX), known)
                hint = f"did you mean {_PREFIX}{near}?" if near else "most settings have none: use options, or --config"
                _log.warn("The variable {name!r} sets nothing; {hint}", name=name, hint=hint)
        twistd = self.parent
        if self.settings.access_log == "-" and twistd is not None and not (twistd["nodaemon"] or twistd["debug"]):
            _log.warn(
                "Nothing is kept of the access log: a daemon has no standard output. Give --access-log FILE, or run "
                "twistd with --nodaemon"
            )

    def load(self) -> Settings:
        """Make settings out of these options, and the environment and the files of now. Raises ``SettingsError``."""
        return self.read()[1]

    def read(self) -> tuple[Said, Settings]:
        """Return the settings as :meth:`load` does, and what they were made of."""
        return read_now(self, os.environ)

    def getUsage(self, width: int | None = None) -> str:
        """Return the options' explanations and a few examples."""
        return super().getUsage(width) + _EXAMPLES

    def take(self, name: str, value: object, repeatable: bool = False) -> None:
        """Note an option. Only a repeatable one may come twice, so that no value is silently ignored."""
        if repeatable:
            self.setdefault(name, []).append(value)
        elif name in self and value is not True:
            raise UsageError(f"--{name} is given twice; give it once")
        else:
            self[name] = value


def _handler(row: Row) -> Any:
    """Return the ``opt_`` method of a setting; ``usage`` takes a method without an argument for a flag."""

    def flag(self: Options) -> None:
        self.take(row.name, True)

    def parameter(self: Options, value: str) -> None:
        self.take(row.name, value, row.repeatable)

    handler = flag if row.kind is FLAG else parameter
    handler.__doc__ = _explain(row)
    return handler


def _explain(row: Row) -> str:
    default = row.default or row.default_note
    notes = [f"default: {default}"] if default else []
    notes += [f"environment: {', '.join(row.environment)}"] if row.environment else []
    return f"{row.help} [{'; '.join(notes)}]" if notes else row.help


for _row in TABLE.values():
    setattr(Options, f"opt_{_row.name.replace('-', '_')}", _handler(_row))


def makeService(options: Options) -> IService:
    """Build the service for the settings, in the reactor that twistd has installed by now."""
    from twisted.internet import reactor  # noqa: PLC0415 (earlier would install the default reactor)

    options.warn()
    service: IService
    if options.settings.workers > 1:  # what is not needed is not imported: --help and --version need neither
        from vllmproxy.workers.parent import Parent  # noqa: PLC0415

        service = Parent(options.said, options.settings, options.read, reactor)
    else:
        from vllmproxy.service import ProxyService  # noqa: PLC0415

        service = ProxyService(options.settings, options.load, reactor)
    return service
