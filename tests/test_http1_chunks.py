"""The chunked coding's own lines (RFC 9112 §7.1), whole and cut anywhere, with h11 as the second opinion."""

import re
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.http1.chunks import LONGEST_LINE, Chunks
from vllmproxy.http1.message import WireError

PIECES = st.sampled_from(
    [
        *(b"0", b"00", b"2", b"a", b"2\r\nok\r\n", b"0\r\n", b"0\r\n\r\n", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"ok"),
        *(b";", b";x", b";x=y", b' ; x = "y;\\"" ', b"=", b'"', b" ", b"\t", b"\x00", b"\xe9", b"x: y\r\n", b"-"),
        *(b"0" * 16, b"f" * 16, b"\x00\r\n0\r\n\r\n"),
    ]
)
BODIES = st.lists(PIECES, max_size=12).map(b"".join)


def read(*pieces: bytes) -> tuple[str, int]:
    """Return what becomes of a body that comes in these pieces, and how many bytes it has."""
    chunks, length = Chunks(), 0
    for piece in pieces:
        try:
            end = chunks.feed(piece)
        except WireError as error:
            return str(error.status), 0
        length += end
        if chunks.whole:
            return "whole", length
        assert end == len(piece)
    return "more", length


@given(BODIES)
@example(b"2\r\nok\r\n0\r\nx: y\r\n\r\nGET / HTTP/1.1\r\n\r\n")
def test_nothing_depends_on_how_a_body_is_cut(data: bytes) -> None:
    whole = read(data)
    assert read(*(data[at : at + 1] for at in range(len(data)))) == whole
    for cut in range(1, len(data)):
        assert read(data[:cut], data[cut:]) == whole


def end_by_h11(data: bytes) -> tuple[bool, int]:
    """Return whether h11 takes the body for whole, and how many bytes it has then."""
    connection: Any = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    try:
        while (event := connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.EndOfMessage):
                return True, len(data) - len(connection.trailing_data[0])
    except h11.RemoteProtocolError:
        pass
    return False, 0


@given(BODIES)
@example(b"2;x=y\r\nok\r\n0\r\nx: y\r\n\r\n0\r\n\r\n")
@example(b"2 \r\nok\r\n0\r\n\r\n")
def test_a_body_ends_where_h11_sees_its_end(data: bytes) -> None:
    whole, length = end_by_h11(data)
    outcome, ours = read(data)
    if whole and outcome == "whole":
        assert ours == length
    if whole:  # h11 takes any text for an extension, and blanks behind a size
        assert outcome == "whole" or b";" in data or b"0" * 17 in data or re.search(rb"[0-9A-Fa-f][ \t]+\r\n", data)


TOKEN = b"!#$%&'*+.^_`|~0-9A-Za-z-"
EXTENSIONS = [
    *(b";x", b";x;y", b";x=y", b";x=y;z", b';x=""', b';x="y"', b'; x = "y;=\t \\" \xe9" ; z', b" ;x", b"\t; \tx\t=\ty"),
    b";%s=%s" % (TOKEN, TOKEN),
]
BAD_SIZES = [b"", b" 2", b"2 ", b"2\t", b"0x2", b"+2", b"-2", b"2h", b"2,3", b"2\x00", b"2\xff", b"0" * 17, b"f" * 17]
BAD_EXTENSIONS = [
    *(b";", b"; ", b";;x", b";=x", b";x=", b";x=;y", b";x=y=z", b';"x"', b";x ", b";x y", b";x,y", b";x;"),
    *(b';x="', b';x="y', b';x="y"z', b';x="\\"', b';x="\x00"', b';x="\\\x00"', b";x\xe9", b";x\rx", b"x;y"),
]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension(extension: bytes) -> None:
    data = b"2%s\r\nok\r\n0%s\r\n\r\n" % (extension, extension)
    assert read(data) == ("whole", len(data))


@pytest.mark.parametrize("line", [*BAD_SIZES, *(b"2" + extension for extension in BAD_EXTENSIONS)])
def test_a_line_that_is_none(line: bytes) -> None:
    assert read(line + b"\r\nok\r\n0\r\n\r\n") == ("400", 0)
    assert read(b"2\r\nok\r\n" + line + b"\r\n\r\n") == ("400", 0)
    assert read(line + b"\nok\r\n0\r\n\r\n") == ("400", 0)


@pytest.mark.parametrize("chunk", [b"2\nok\r\n", b"2\r\nok\n", b"2\r\nokk\r\n", b"3\r\nok\r\n"])
def test_data_that_ends_elsewhere(chunk: bytes) -> None:
    assert read(chunk + b"0\r\n\r\n") == ("400", 0)


@pytest.mark.parametrize("begin", [b"2;", b"0", b"0\r\nx: ", b"0\r\n"])
def test_a_line_without_end(begin: bytes) -> None:
    assert read(begin + b"0" * (LONGEST_LINE + 1))[0] == "431"
    assert read(begin, *[b"a" * 1000] * 17)[0] == "431"
