"""The simulated vLLM's WebSocket."""

import base64
import os

import pytest
from _simulated import Memory, request
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.simulator.websocket import FrameEcho, accept_key, frame, unmask

HANDSHAKE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def masked(opcode: int, payload: bytes, *, final: bool = True, mask: bytes = b"\x01\x82\x33\xf4") -> bytes:
    """A frame as a client sends it (RFC 6455 §5.2), built here without the code under test."""
    first = (0x80 if final else 0) | opcode
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 65536:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def opened(**headers: str) -> Memory:
    memory = Memory()
    memory.client.transport.write(request("GET", "/v1/realtime", **(HANDSHAKE | headers)))  # type: ignore[union-attr]
    memory.pump.flush()
    assert memory.client.data.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    return memory


def exchange(memory: Memory, data: bytes) -> bytes:
    before = len(memory.client.data)
    memory.client.transport.write(data)  # type: ignore[union-attr]
    memory.pump.flush()
    return memory.client.data[before:]


def test_the_example_of_rfc_6455() -> None:
    assert accept_key(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in opened().client.data


def test_frames_come_back_and_the_connection_outlives_the_keep_alive() -> None:
    memory = opened()
    memory.wait(100)
    assert exchange(memory, masked(1, b"hello")) == frame(1, b"hello")
    assert exchange(memory, masked(9, b"still?")) == frame(10, b"still?")
    assert memory.client.lost is None
    memory.leave()
    assert memory.stats.aborts == 0


def test_a_close_is_answered_and_ends_the_connection() -> None:
    memory = opened()
    assert exchange(memory, masked(8, (1000).to_bytes(2, "big") + b"bye")) == frame(8, (1000).to_bytes(2, "big"))
    assert memory.client.lost is not None


def test_an_unmasked_frame_is_a_protocol_error() -> None:
    memory = opened()
    assert exchange(memory, frame(1, b"x")) == frame(8, (1002).to_bytes(2, "big"))
    assert memory.client.lost is not None


def test_bytes_that_came_with_the_handshake_are_not_lost() -> None:
    memory = Memory()
    handshake = request("GET", "/v1/realtime", **HANDSHAKE)
    memory.client.transport.write(handshake + masked(2, b"early"))  # type: ignore[union-attr]
    memory.pump.flush()
    assert memory.client.data.endswith(b"\r\n\r\n" + frame(2, b"early"))


def test_raw_echoes_what_is_no_frame() -> None:
    memory = opened(x_vllmsim="raw")
    assert exchange(memory, b"\x00anything\xff") == b"\x00anything\xff"


def test_a_socket_on_another_path_is_a_403() -> None:
    memory = Memory()
    (answer,) = memory.send(request("GET", "/v1/models", **HANDSHAKE))
    assert (answer.status, answer.header("Content-Length")) == (403, "0")
    assert memory.client.lost is not None


def test_an_upgrade_may_be_refused() -> None:
    (answer,) = Memory().send(request("GET", "/v1/realtime", **(HANDSHAKE | {"x_vllmsim": "upgrade-refused"})))
    assert answer.status == 403


def test_a_refusal_may_leave_the_connection_http() -> None:
    memory = Memory()
    directive = {"x_vllmsim": "status; code=403"}
    assert memory.ask(request("GET", "/v1/realtime", **(HANDSHAKE | directive))).status == 403
    assert memory.ask(request("GET", "/health")).status == 200


@pytest.mark.parametrize("change", [{"sec_websocket_version": "12"}, {"sec_websocket_key": ""}])
def test_a_bad_handshake_is_a_400(change: dict[str, str]) -> None:
    (answer,) = Memory().send(request("GET", "/v1/realtime", **(HANDSHAKE | change)))
    assert answer.status == 400


@given(st.data())
def test_any_frames_cut_anywhere_come_back(data: st.DataObject) -> None:
    payloads = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
    mask = data.draw(st.binary(min_size=4, max_size=4))
    wire = b"".join(masked(2, payload, mask=mask) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    echo = FrameEcho()
    out = b"".join(echo.feed(wire[a:b]) for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True))
    assert out == b"".join(frame(2, payload) for payload in payloads)


@pytest.mark.parametrize("size", [125, 126, 65535, 65536, 200000])
def test_each_length_form(size: int) -> None:
    payload = os.urandom(size)
    assert FrameEcho().feed(masked(2, payload)) == frame(2, payload)


def test_fragments_keep_their_bits() -> None:
    out = FrameEcho().feed(masked(1, b"a", final=False) + masked(0, b"b"))
    assert out == b"\x01\x01a" + b"\x80\x01b"


def test_unmask_at_an_offset() -> None:
    mask = base64.b16decode("01020304")
    assert unmask(b"\x00\x00\x00", mask, 6) == b"\x03\x04\x01"
