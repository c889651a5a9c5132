"""A transparent gateway in front of vLLM: every endpoint in its own format, behind virtual keys."""

__version__ = "0.1.0"
