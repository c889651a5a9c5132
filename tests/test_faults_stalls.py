"""Peers that stop taking bytes, and handshakes that do not end: every one of these waits has an end."""

import socket
import threading
import time
from contextlib import suppress

import pytest
from _asking import until
from _ports import free_port
from _raw import Upstream, Wire, connect, request
from _service import Twistd, start_proxy

#: What the proxy of this file is started with (conftest.py).
PROXY_OPTIONS = ("--write-timeout", "1", "--connect-timeout", "1")
HANDSHAKE = request(b"GET", b"/vllm/v1/realtime", b"Upgrade: websocket", b"Connection: Upgrade")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n"
MB = 1_000_000


def test_an_upstream_that_stops_taking_an_upload_is_a_504(upstream: Upstream, scripted_proxy: Twistd) -> None:
    done = threading.Event()

    def script(wire: Wire) -> None:
        wire.head()
        done.wait(30)

    head = request(b"POST", b"/vllm/v1/x", b"Content-Length: 100000000")
    with upstream.playing(script), connect(scripted_proxy) as client:
        client.send(head)
        sender = threading.Thread(target=_pour, args=(client, 100 * MB), daemon=True)
        sender.start()
        assert client.head().status == 504
        done.set()


def _pour(client: Wire, size: int) -> None:
    with suppress(OSError):
        client.pour(b"x" * MB, size // MB)


def test_a_client_that_resets_behind_a_stalled_tunnel_is_noticed(upstream: Upstream, scripted_proxy: Twistd) -> None:
    full, ended = threading.Event(), threading.Event()

    def script(wire: Wire) -> None:
        wire.head()
        wire.send(SWITCH)
        full.wait(30)
        with suppress(OSError):
            wire.gone_at()
        ended.set()

    with upstream.playing(script):
        client = connect(scripted_proxy)
        client.send(HANDSHAKE)
        assert client.head().status == 101
        client.sock.settimeout(0.3)
        with suppress(OSError):
            while True:
                client.sock.send(b"x" * 65536)
        client.reset()
        full.set()
        until(ended.is_set)


def test_an_early_answer_reaches_a_slow_reader_whole(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """It came before the upload was over, so the connection closes behind it, which must not reset it away."""
    size = 8 * MB

    def script(wire: Wire) -> None:
        wire.head()
        wire.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: %d\r\n\r\n" % size + b"y" * size)

    with upstream.playing(script):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect(("127.0.0.1", scripted_proxy.port))
        sock.settimeout(30)
        sock.sendall(request(b"POST", b"/vllm/v1/x", b"Content-Length: 1000000") + b"x" * 1000)
        received = 0
        while piece := sock.recv(65536):
            received += len(piece)
            time.sleep(0.025)
        sock.close()
    assert received > size


@pytest.mark.parametrize("how", ["silent", "closes"])
def test_a_tls_handshake_that_does_not_end_is_a_503(how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    if how == "closes":
                        held.pop().close()

        threading.Thread(target=serve, daemon=True).start()
        proxy = start_proxy(tmp_path_factory.mktemp("tls"), f"https://127.0.0.1:{port}", *PROXY_OPTIONS)
        try:
            with connect(proxy) as client:
                client.send(request(b"GET", b"/vllm/v1/models"))
                answer = client.message()
                assert answer.status == 503
                assert b"Nothing was sent" in answer.body
        finally:
            proxy.stop()
            for sock in held:
                sock.close()
        assert "Traceback" not in proxy.log
