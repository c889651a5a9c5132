"""``vllmproxy`` and ``python -m vllmproxy``: the management command."""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        # In here, so that Ctrl-C during the imports is no traceback either.
        from vllmproxy.cli.main import run  # noqa: PLC0415

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
