import json
import mmap
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.inspection.attachments import attachments_in, read_around
from vllmproxy.inspection.document import Document, Unreadable, read_document
from vllmproxy.inspection.request import LONGEST_END_USER, Asked, read_request
from vllmproxy.inspection.splice import edited, usage_edits

RUN = b"iVBO" * 1500  # longer than those that are not cut
PICTURE = b'"data:image/png;base64,' + RUN + b'"'
SHORT = b'"data:image/png;base64,' + RUN[:400] + b'"'
SOURCE = b'{"type":"base64","data" : "' + RUN + b'"}'
#: As PHP's json_encode writes it.
ESCAPED = b'"data:image\\/jpeg;base64,' + rb"\/9j" * 1500 + b'"'
#: The same, and what is cut off would begin with half an escape.
SHIFTED = ESCAPED.replace(b"base64,", b"base64,AAA")
WANTED = frozenset({"messages", "model", "stream", "user"})
UNREAD = frozenset({"messages"})

#: What, put together at random, is JSON with attachments in it, or nearly.
PIECES = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b" ", b'"', b"\\", b'\\"', b"\xc3\xa9", b"1", b'"a"', b'"data"'),
        *(b'"messages":', b'"model":', b'"user":', b'"stream":true,', b',"model":"m"'),
        *(SHORT, SHORT[:-1], b'"data":"' + RUN[:4096] + b'"', b"\\" + SHORT[:-1] + b'\\"'),
        *(PICTURE, PICTURE[:-1], b"\\" + PICTURE, b"\\" + PICTURE[:-1] + b'\\"', PICTURE[:-1] + b' "', RUN),
        *(ESCAPED, SHIFTED, ESCAPED[:-1], ESCAPED[:1500] + b'"', ESCAPED[:1501] + b'"', b'"data":"x' + ESCAPED[24:]),
        *(ESCAPED[:-1] + b"\\", ESCAPED[:-1] + rb"\u0041", ESCAPED[:4000] + rb"\n" + ESCAPED[4000:], rb"\/", b"/"),
        *(SOURCE, SOURCE[1:-1], b'"data":"' + RUN + b'"', b'\\"data":"' + RUN + b'"'),
    ]
)


def asked(body: bytes, path: str = "/v1/chat/completions") -> Asked:
    return read_request(path, body, b"application/json")


def mapped(body: bytes) -> mmap.mmap:
    """Return ``body`` as a large one is held: written, so that its position is at its end."""
    made = mmap.mmap(-1, len(body))
    made.write(body)
    return made


def members(document: Document, *, without: frozenset[str]) -> dict[str, tuple[object, int, int]]:
    return {
        name: (None if name in without else repr(document.values[name]), *span) for name, span in document.spans.items()
    }


def reads_alike(body: bytes) -> None:
    """What is read without the attachments is what is read with them."""
    found = attachments_in(body)
    try:
        whole = read_document(body, WANTED)
    except Unreadable as error:
        with pytest.raises(Unreadable, match=str(error)):
            read_around(body, found, WANTED, UNREAD)
        return
    around = read_around(body, found, WANTED, UNREAD)
    assert members(around, without=UNREAD) == members(whole, without=UNREAD)
    assert (around.repeated, around.opening, around.empty) == (whole.repeated, whole.opening, whole.empty)


@given(st.lists(PIECES, max_size=10).map(b"".join))
@example(b'{"model":"m","messages":[' + PICTURE + b"," + SOURCE + b'],"stream":true}')
@example('{"user":"é","messages":['.encode() + PICTURE + b',"\xc3\xa9",' + PICTURE + b'],"model":"m"}')
@example(b'{"messages":[],"user":' + PICTURE + b',"model":"m"}')
@example(b'{"a\\"data":"' + RUN + b'","model":"m"}')
@example(b'{"model":"a","x":' + PICTURE + b',"model":"b"}')
@example(b'{"model":"m","messages":[' + ESCAPED + b"," + SHIFTED + b'],"stream":true}')
@example(b'{"messages":[' + SHIFTED[:-1] + rb"\u00e9" + b'"],"stream":true}')
def test_a_body_reads_alike_with_and_without_its_attachments(body: bytes) -> None:
    reads_alike(body)


@given(st.lists(PIECES, max_size=6).map(b"".join), st.lists(PIECES, max_size=4).map(b"".join))
def test_members_behind_attachments_are_where_they_are(inside: bytes, behind: bytes) -> None:
    reads_alike(b'{"messages":[' + inside + PICTURE + b'],"model":"m"' + behind + b"}")


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (b"[" + PICTURE + b"," + SOURCE + b"]", 2),
        (b'"data:;base64,' + b"A" * 256 + b'"', 1),
        (b'"data:;base64,' + b"A" * 4095 + b'"', 1),
        (b'"data:;base64,' + b"A" * 4096 + b'"', 1),
        (b'"data:;base64,' + b"A" * 4096 + b' "', 0),
        (b'"data:;base64,' + b"A" * 4097 + b'"', 1),
        (b'"data:;base64,' + b"A" * 300 + b'\\n"' + SHORT, 1),
        (b'"data:;base64,' + b"A" * 5000, 0),
        (SHORT[:-1] + SHORT + PICTURE[:-1] + PICTURE, 2),
        (b'"data:;base64,' + b"A" * 255 + b'"', 0),
        (b'"data:;base64,' + b"A" * 200_000 + b'"', 1),
        (b'"data:;base64,' + b"A" * 200_000 + b' "', 0),
        (b'"data:;base64,' + b"A" * 200_000 + b'\xc3\xa9"', 0),
        (b'"data:;base64,' + b"A" * 100_000 + b" " + b"A" * 100_000 + b'"' + PICTURE, 1),
        (b'"data:;base64,' + b"A" * 100_000 + b"\\n" + b"A" * 100_000 + b'"' + PICTURE, 1),
        (b'"data:;base64,' + b"A" * 300, 0),
        (b'"data":"' + b"A" * 300 + b"\n" + b'"', 0),
        (b'"data":1,' + PICTURE[:50], 0),
        (ESCAPED, 1),
        (SHIFTED, 1),
        (ESCAPED[:1504] + b'"', 1),
        (ESCAPED[:1504] + b'\\"', 0),
        (ESCAPED[:1504] + b"\\", 0),
        (ESCAPED[:1504] + b'\\n"', 0),
        (ESCAPED[:-1] + b'\\\\/"', 0),
        (ESCAPED[:-1] + b'\\"' + PICTURE, 1),
        (b'"data:;base64,' + b"A" * 100_000 + rb"\/" + b"A" * 65_535 + rb"\/" + b'"', 1),
        (b'"data:;base64,' + b"A" * 100_000 + rb"\\" + b"/" * 65_535 + b'"', 0),
    ],
)
def test_only_what_may_be_base64_is_an_attachment(body: bytes, number: int) -> None:
    found = attachments_in(body)
    assert len(found) == number
    for attachment in found:
        assert body.startswith(b'"data', attachment.start)
        assert body[attachment.end : attachment.end + 1] == b'"'
        assert not body[attachment.begun : attachment.end].replace(rb"\/", b"").strip(b"AiVBO9j")


def test_what_is_no_json_in_one_is_left_for_vllm_to_refuse() -> None:
    body = b'{"messages":[' + PICTURE[:-1] + b'\x00"],"model":"m"}'
    assert asked(body).model == "m"
    with pytest.raises(Unreadable):
        read_document(body)


def test_what_decides_is_read_whole_though_it_looks_like_an_attachment() -> None:
    name = "data:;base64," + "A" * 9000
    body: dict[str, Any] = {"model": name, "user": name, "metadata": {"data": "A" * 9000, "user_id": "u"}}
    found = asked(json.dumps(body).encode())
    assert (found.surety, found.model) == ("named", name)
    assert found.end_user == name[:LONGEST_END_USER]
    assert asked(b'{"metadata":{"data":"' + RUN + b'","user_id":"u"}}').end_user == "u"


def test_prompts_are_counted_though_they_are_attachments() -> None:
    body = b'{"prompt_embeds":[' + b",".join([PICTURE] * 3) + b'],"max_tokens":5}'
    assert asked(body, "/v1/completions").output_tokens == 15
    assert asked(b'{"prompt":' + PICTURE + b',"max_tokens":5}', "/v1/completions").output_tokens == 5


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[' + PICTURE + b'],"model":"m","stream":true,"stream_options":{"include_usage":false},"n":2}',
        b'{"user":' + PICTURE + b',"model":"m"}',
        b'{"messages":[],"model":"m","stream":true}',
        '{"model":"m"}'.encode("utf-16"),
        b"[]",
    ],
)
def test_a_body_in_memory_of_its_own_reads_alike(body: bytes) -> None:
    path = "/v1/chat/completions"
    found = read_request(path, mapped(body), b"application/json")
    assert found == asked(body)
    edits = usage_edits(path, found)
    assert edits == usage_edits(path, asked(body))
    assert b"".join(edited(mapped(body), edits)) == b"".join(edited(body, edits))


def test_a_form_in_memory_of_its_own_reads_alike() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
    kind = b"multipart/form-data; boundary=b"
    found = read_request("/v1/audio/transcriptions", mapped(body), kind)
    assert (found.model, found.form) == ("whisper", read_request("/v1/audio/transcriptions", body, kind).form)


def test_what_is_changed_behind_an_attachment_is_changed_in_its_place() -> None:
    options = b'],"model":"m","stream":true,"stream_options":%b}'
    body = b'{"messages":[' + PICTURE + options
    edits = usage_edits("/v1/chat/completions", asked(body % b"null"))
    assert b"".join(edited(body % b"null", edits)) == body % b'{"include_usage":true}'
