"""Clients that send a body of 1 MB by one byte a second, and come again when they are cut off.

    python benchmarks/_drops.py PORT CONNECTIONS ADDRESSES SECONDS

They come from as many addresses of loopback, 500 new ones a second at most. Printed is how many there were at the end,
and how many more had been cut off.
"""

import resource
import socket
import sys
import time

HEAD = (
    b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000000\r\n\r\n"
)
RATE = 500


class Client:
    """One of them; it is there while it has a socket."""

    def __init__(self, number: int, port: int, addresses: int) -> None:
        self._source = (f"127.0.0.{2 + number % addresses}", 0)
        self._port = port
        self._sock: socket.socket | None = None
        self._began = False

    def come(self) -> bool:
        """Connect if it is not there; tell whether it did."""
        if self._sock is not None:
            return False
        self._sock = socket.socket()
        self._sock.setblocking(False)
        self._sock.bind(self._source)
        self._sock.connect_ex(("127.0.0.1", self._port))
        self._began = False
        return True

    def drop(self) -> bool:
        """Send a byte; tell whether it was found to be cut off."""
        if self._sock is None:
            return False
        try:
            self._sock.send(b"x" if self._began else HEAD)
            self._began = True
        except BlockingIOError:
            pass
        except OSError:
            self._sock.close()
            self._sock = None
            return True
        return False

    @property
    def is_there(self) -> bool:
        return self._sock is not None


def main(port: int, connections: int, addresses: int, seconds: float) -> None:
    """Attack for that long."""
    clients = [Client(number, port, addresses) for number in range(connections)]
    cut, end = 0, time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        cut += sum([client.drop() for client in clients])
        came = 0
        for client in clients:
            came += client.come()
            if came == RATE:
                break
        time.sleep(max(0.0, now + 1 - time.monotonic()))
    print(f"{sum(client.is_there for client in clients)} there, {cut} cut off", flush=True)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
