import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.inspection.form import LONGEST_FIELD
from vllmproxy.inspection.request import Asked, read_request
from vllmproxy.inspection.splice import edited, model_edits, usage_edits

PATH = "/v1/audio/transcriptions"
TYPE = b"multipart/form-data; boundary=b0"
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'


def part(name: bytes, value: bytes, extra: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"' + extra + b"\r\n\r\n" + value


def form(*parts: bytes, boundary: bytes = b"b0") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def read(body: bytes, content_type: bytes = TYPE) -> Asked:
    return read_request(PATH, body, content_type)


def test_the_fields_of_a_form() -> None:
    audio = FILE + b"\x00\xff--b0\r\n" * 3
    body = form(
        audio,
        part(b"model", "whispér".encode()),
        part(b"stream", b"true"),
        part(b"stream_include_usage", b"1"),
        part(b"max_completion_tokens", b"50"),
        part(b"user", b" u\n"),
        part(b"prompt", b"model"),
    )
    asked = read(body)
    assert (asked.surety, asked.model, asked.stream, asked.usage) == ("named", "whispér", True, True)
    assert (asked.output_tokens, asked.end_user) == (50, "u")
    assert b"".join(edited(body, model_edits(asked, "large-v3"))) == body.replace("whispér".encode(), b"large-v3")
    assert usage_edits(PATH, asked) == []
    with pytest.raises(ValueError, match="no model"):
        model_edits(asked, "a\r\nb")


def test_what_is_not_there() -> None:
    asked = read(form(FILE + b"x"))
    assert (asked.surety, asked.stream, asked.usage) == ("absent", False, False)
    assert (asked.output_tokens, asked.end_user) == (None, None)


def test_an_empty_model_is_none() -> None:
    assert read(form(part(b"model", b""))).surety == "absent"


MODEL = part(b"model", b"a")


@pytest.mark.parametrize(
    "body",
    [
        form(MODEL, MODEL),
        form(MODEL, part(b"model", b"b", b'; filename="x"')),
        form(part(b"model", b"b", b'; filename="x"'), MODEL),
        form(part(b"model", b"b", b'; filename=""')),
        form(part(b"model", b"b", b"; filename*=utf-8''x")),
        form(part(b"model", b"b", b'; name="x"')),
        form(part(b"x", b"b", b'; name="model"')),
        form(part(b"x", b"b", b"; name*=utf-8''model")),
        form(part(b"x", b"b", b'; Name="model"')),
        form(part(b"x", b"b", b"\r\nContent-Disposition: form-data; name=model")),
        form(part(b"model", b"\xff")),
        form(part(b"\xff", b"a")),
        form(part(b"model", b"x" * (LONGEST_FIELD + 1))),
        form(b'Content-Disposition: form-data; filename="x"\r\n\r\na'),
        form(b"Content-Type: text/plain\r\n\r\na"),
        form(b"\r\na"),
        form(b'Content-Disposition: attachment; name="model"\r\n\r\na'),
        form(b'Content-Disposition: form-data; name="model"\n\na'),
        b"",
        b'{"model":"a"}',
        b"--b0--\r\n" + form(MODEL),
        b"preamble\r\n" + form(MODEL),
        b"\r\n" + form(MODEL),
        form(MODEL)[:-4],
        form(MODEL)[:-6],
        form(MODEL) + b"epilogue",
        form(MODEL) + form(part(b"model", b"b")),
        form(MODEL, boundary=b"b1"),
        form(MODEL).replace(b"--b0\r\n", b"--b0 \r\n"),
        form(MODEL).replace(b"\r\n", b"\n"),
        form(part(b"x", b"y\r\n--b0 \r\n" + MODEL)),
        form(part(b"x", b"y\r\n--b0x\r\n" + MODEL)),
    ],
)
def test_an_ambiguous_form(body: bytes) -> None:
    asked = read(body)
    assert (asked.surety, asked.model) == ("ambiguous", None)
    assert asked.reason


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=b0; boundary=b0",
        b"multipart/form-data; boundary*=b0",
        b'multipart/form-data; boundary="b0\xff"',
        b"multipart/form-data; boundary=" + b"b" * 71,
        b"multipart/form-data; boundary=b0; charset=utf-16",
        b"multipart/form-data; boundary=b0; charset=latin-1",
        b"multipart/form-data; boundary=b0; charset=none-such",
        b"multipart/form-data; boundary=b0; charset=utf-8; charset=utf-16",
        b"application/x-www-form-urlencoded",
    ],
)
def test_an_ambiguous_content_type(content_type: bytes) -> None:
    assert read(form(MODEL), content_type).surety == "ambiguous"


@pytest.mark.parametrize(
    "content_type",
    [
        b'Multipart/Form-Data; Boundary="b0"',
        b"multipart/form-data;charset=UTF-8; boundary=b0",
        b"multipart/form-data ; boundary=b0",
    ],
)
def test_other_spellings_of_the_content_type(content_type: bytes) -> None:
    assert read(form(MODEL), content_type).model == "a"


@given(st.binary(max_size=200), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_a_file_may_hold_anything(audio: bytes, model: str) -> None:
    audio = audio.replace(b"\r\n--b0", b"")
    body = form(FILE + audio, part(b"model", model.encode()))
    asked = read(body)
    assert asked.model == model
    start = body.rindex(b"\r\n\r\n") + 4 if b"\r\n\r\n" not in model.encode() else -1
    if start > 0:
        assert b"".join(edited(body, model_edits(asked, "new"))) == form(FILE + audio, part(b"model", b"new"))
