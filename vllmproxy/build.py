"""How this installation was built."""

from typing import Final

from vllmproxy import __version__, recurring

#: Whether the modules that every request goes through are compiled (``hatch_build.py``).
IS_COMPILED: Final = not str(recurring.__file__).endswith(".py")
#: What the log and ``--version`` say.
VERSION: Final = f"{__version__} (compiled)" if IS_COMPILED else __version__
