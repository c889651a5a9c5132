"""Standard output."""

import json
import sys
from typing import Any

from vllmproxy.cli.text import plain


def write(text: str) -> None:
    """Write ``text``, which is fit for a terminal."""
    sys.stdout.write(text)


def write_json(value: Any) -> None:
    """Write ``value`` as JSON in ASCII, which holds no control characters but line ends."""
    write(json.dumps(value, indent=2) + "\n")


def write_file(text: str) -> None:
    """Write what is meant for a file: as it is, but for a terminal made fit."""
    write("".join(f"{plain(line)}\n" for line in text.splitlines()) if sys.stdout.isatty() else text)
