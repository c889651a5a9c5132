"""Where the proxy is and who asks it: out of options and environment."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import httpx
from attrs import field, frozen

from vllmproxy.cli.errors import CommandError

DEFAULT_URL: Final = "http://127.0.0.1:4000"
URL_VARIABLE: Final = "VLLMPROXY_URL"
#: Where the proxy itself reads its master key, too.
KEY_VARIABLES: Final = ("VLLMPROXY_MASTER_KEY", "LITELLM_MASTER_KEY")
_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")


@frozen(kw_only=True)
class Place:
    """A proxy and how it is asked.

    :ivar name: what messages call it.
    :ivar url: what paths are appended to.
    :ivar socket: the path of its UNIX socket, ``None`` for TCP.
    :ivar key: shown to it, ``None``: no key.
    :ivar ca: a file with the authorities that are trusted, ``None``: the system's.
    :ivar timeout: seconds for each call, all in all.
    """

    name: str
    url: httpx.URL
    socket: str | None = None
    key: str | None = field(default=None, repr=False)
    ca: str | None = None
    timeout: float = 30.0


def find_place(options: argparse.Namespace, environ: Mapping[str, str]) -> Place:
    """Return the place that ``options`` and, where they say nothing, ``environ`` name.

    :raises CommandError: an address or a key that is none.
    """
    option, variable = options.url, environ.get(URL_VARIABLE, "").strip()
    said = "--url" if option else URL_VARIABLE
    text = option or variable or DEFAULT_URL
    key = _key(options.key_file, environ)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/"):
            raise CommandError(f"{said}: a UNIX socket is written unix:/path/to/socket, with an absolute path.")
        url = httpx.URL("http://localhost")
        return Place(name=text, url=url, socket=path, key=key, ca=options.ca, timeout=options.timeout)
    return Place(name=text, url=_url(text, said), key=key, ca=options.ca, timeout=options.timeout)


def _url(text: str, said: str) -> httpx.URL:
    """Return the URL; ``text`` is not repeated in errors, for it may hold a password."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise CommandError(f"{said}: that is no URL; write it like {DEFAULT_URL}.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise CommandError(f"{said}: begin it with http:// or https:// and a host, or give unix:/path/to/socket.")
    if url.userinfo:
        raise CommandError(f"{said}: leave user and password out; the key comes from --key-file.")
    if url.query or url.fragment:
        raise CommandError(f"{said}: leave out what follows ? or #.")
    return url


def _key(file: str | None, environ: Mapping[str, str]) -> str | None:
    if file is not None:
        return read_key(Path(file), "--key-file")
    for variable in KEY_VARIABLES:
        text = environ.get(variable, "").strip()
        if text:
            return checked_key(text, variable)
    return None


def read_key(path: Path, said: str) -> str:
    """Return the key in a file. Raises :class:`CommandError`, naming ``said``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{said}: cannot read {str(path)!r} ({error.strerror}).") from None
    except ValueError:
        raise CommandError(f"{said}: {str(path)!r} is not text.") from None
    return checked_key(text, said)


def checked_key(text: str, said: str) -> str:
    """Return the key that ``text`` is. Raises :class:`CommandError`, which never repeats it."""
    key = text.strip()
    if not key:
        raise CommandError(f"{said}: there is no key in it.")
    if not _VISIBLE.fullmatch(key):
        raise CommandError(f"{said}: a key is one line of visible ASCII without spaces.")
    return key
