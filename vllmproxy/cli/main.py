"""Runs one command: out of arguments an exit status, and on failure one sentence on standard error."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vllmproxy.cli.arguments import parse
from vllmproxy.cli.client import Client
from vllmproxy.cli.errors import CommandError
from vllmproxy.cli.keys import COMMANDS
from vllmproxy.cli.place import find_place
from vllmproxy.cli.text import complain
from vllmproxy.cli.usage import show_usage

FAILED = 1
#: What a shell says of a program that SIGPIPE ended.
READER_LEFT = 141
INTERRUPTED = 130

_COMMANDS: dict[str, Callable[[Client, Any], int]] = {**COMMANDS, "usage": show_usage}


def run(arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` (without the program's name) are, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding does not have is shown escaped.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a TextIOWrapper, here as in tests
    try:
        status = _status(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        status = READER_LEFT
    except OSError as error:
        complain(f"Cannot write to standard output: {error.strerror}.")
        status = FAILED
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status in (READER_LEFT, FAILED):
        _forget_output()
    return status


def _status(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments)
        with Client(find_place(options, os.environ)) as client:
            return _COMMANDS[options.command](client, options)
    except CommandError as error:
        complain(str(error))
        return FAILED
    except SystemExit as ended:  # argparse has said what there was to say
        return ended.code if isinstance(ended.code, int) else FAILED


def _forget_output() -> None:
    """Let the interpreter flush what nobody can take at its end into nothing, without a word."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
