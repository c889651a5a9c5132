"""How a key is named to a command: by an alias, a hash, or the key itself.

The key itself never leaves this process: the proxy is asked by its hash.
"""

import getpass
import re
import sys
from typing import Final

from attrs import frozen

from vllmproxy.cli.errors import CommandError
from vllmproxy.cli.place import checked_key
from vllmproxy.cli.text import complain
from vllmproxy.keys.key import hash_key

_HASH: Final = re.compile(r"[0-9a-f]{64}")
#: A custom key has 16 characters or more; an alias may begin so, if it is shorter.
_KEY: Final = re.compile(r"sk-[\x21-\x7e]{13,}")
_WARNING: Final = (
    "A key on the command line is seen by other users of this machine and kept by the shell; "
    "give - and the key on standard input, or name it by its alias or hash."
)


@frozen
class KeyName:
    """One key's name. Either ``token`` (the hash) or ``alias`` is given.

    :ivar shown: what messages call the key.
    """

    shown: str
    token: str | None = None
    alias: str | None = None


def parse_name(text: str) -> KeyName:
    """Return the name that an argument is; ``-`` reads a key from standard input.

    :raises CommandError: there is no key on standard input.
    """
    if text == "-":
        return _by_key(checked_key(_read_line(), "Standard input"))
    if _HASH.fullmatch(text):
        return KeyName(f"{text[:16]}...", token=text)
    if _KEY.fullmatch(text):
        complain(_WARNING)
        return _by_key(text)
    if not text:
        raise CommandError("An empty name names no key; give an alias, a hash, or - for a key on standard input.")
    return KeyName(repr(text), alias=text)


def _by_key(key: str) -> KeyName:
    if _HASH.fullmatch(key):
        return KeyName(f"{key[:16]}...", token=key)
    return KeyName(f"sk-...{key[-4:]}", token=hash_key(key))


def _read_line() -> str:
    if sys.stdin.isatty():
        return getpass.getpass("Key: ")
    try:
        return sys.stdin.readline()
    except ValueError:
        raise CommandError("Standard input: a key is one line of visible ASCII without spaces.") from None
