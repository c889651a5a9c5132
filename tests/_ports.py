"""Ports of loopback for servers that tests start."""

import random
import socket
from pathlib import Path
from typing import Final

_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 10_000


def free_port() -> int:
    """Return a port that nobody uses just now, and that no connection is given before a server has it: the kernel takes
    those from a range of its own (ip(7))."""
    for _ in range(1000):
        port = random.randrange(_LOWEST, max(int(_RANGE.read_text().split()[0]), _LOWEST + 1000))
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is no free port")
