"""A transparent gateway in front of vLLM: every endpoint in its own format, behind virtual keys."""

__version__ = "0.1.0"
#: What the Server field of the proxy's own answers says (RFC 9110 §10.2.4).
PRODUCT = f"vllmproxy/{__version__}".encode()
