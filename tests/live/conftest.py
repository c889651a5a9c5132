"""The live suite: a real vLLM behind a real proxy, when somebody names one; otherwise nothing here is collected.

``VLLMPROXY_LIVE_URL`` is the proxy's base URL with its prefix (``http://127.0.0.1:4000/vllm``), ``VLLMPROXY_LIVE_KEY``
a virtual or the master key (left out where auth is off). ``VLLMPROXY_LIVE_MASTER`` is the master key, which makes keys
and reads what they used. ``VLLMPROXY_LIVE_DIRECT`` is the URL of vLLM itself, where it
can be reached: then each answer is also compared with the one that comes without the proxy.
"""

import os

import pytest
from _live import Server

#: What each file needs besides the URL.
_NEEDS = {
    "test_live.py": "VLLMPROXY_LIVE_URL",
    "test_live_direct.py": "VLLMPROXY_LIVE_DIRECT",
    "test_live_usage.py": "VLLMPROXY_LIVE_MASTER",
}
collect_ignore = [
    file for file, name in _NEEDS.items() if not (os.environ.get("VLLMPROXY_LIVE_URL") and os.environ.get(name))
]


@pytest.fixture(scope="session")
def live() -> Server:
    """vLLM through the proxy."""
    return Server(os.environ["VLLMPROXY_LIVE_URL"], os.environ.get("VLLMPROXY_LIVE_KEY"))


@pytest.fixture(scope="session")
def direct() -> Server:
    """vLLM itself."""
    return Server(os.environ["VLLMPROXY_LIVE_DIRECT"], None)
