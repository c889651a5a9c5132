"""What settings were made of, so that another process can make the same ones, whatever has become of the files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from attrs import asdict, frozen

from vllmproxy.settings import Settings, load, read_text


@frozen(repr=False)
class Said:
    """Options and files; the environment is inherited. It holds secrets.

    :ivar options: as :func:`vllmproxy.settings.load` takes them.
    :ivar files: the text of each file that was read, by its name.
    """

    options: Mapping[str, Any]
    files: Mapping[str, str]

    def settings(self, environ: Mapping[str, str]) -> Settings:
        """Make the settings. Raises :class:`~vllmproxy.settings.SettingsError`."""
        return load(self.options, environ, self._read)

    def _read(self, path: Path) -> str:
        try:
            return self.files[str(path)]
        except KeyError:
            raise FileNotFoundError(2, "it was not there", str(path)) from None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> Self:
        return cls(**said)


def read_now(options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Said, Settings]:
    """Make settings out of the files of now. Raises :class:`~vllmproxy.settings.SettingsError`."""
    files: dict[str, str] = {}

    def read(path: Path) -> str:
        files[str(path)] = text = read_text(path)
        return text

    settings = load(options, environ, read)
    return Said(dict(options), files), settings
