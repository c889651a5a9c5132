import json
from typing import Any

import pytest
from _bodies import bodies
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.inspection.lax import MOST
from vllmproxy.inspection.request import LONGEST_END_USER, Asked, read_request

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = b"application/json"


def read(body: object, path: str = CHAT, content_type: bytes | None = JSON) -> Asked:
    return read_request(path, body if isinstance(body, bytes) else json.dumps(body).encode(), content_type)


@given(bodies())
def test_a_named_model_is_what_vllm_takes(body: bytes) -> None:
    asked = read(body)
    pairs = json.loads(body, object_pairs_hook=list)
    models = [value for name, value in pairs if name == "model"]
    named = len(models) == 1 and isinstance(models[0], str) and models[0] not in ("", "\ud800")
    assert (asked.surety == "named") == named == (asked.model is not None)
    assert asked.model == (models[0] if named else None)
    assert (asked.surety == "absent") == (models in ([], [None], [""]))
    assert (asked.surety == "ambiguous") == (asked.reason != "")
    assert len(asked.end_user or "") <= LONGEST_END_USER
    assert (asked.end_user or "").isprintable()
    assert asked.output_tokens is None or 0 <= asked.output_tokens <= MOST


@given(st.binary(max_size=60), st.one_of(st.none(), st.just(JSON), st.just(b"multipart/form-data; boundary=x")))
def test_it_never_raises(body: bytes, content_type: bytes | None) -> None:
    asked = read(body, CHAT, content_type)
    assert asked.model is None or asked.surety == "named"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"model":"a","model":"a"}', "the model is given twice"),
        (b'{"model":"a","mod\\u0065l":"b"}', "the model is given twice"),
        ('{"model":"a"}'.encode("utf-16"), "the body is not UTF-8"),
        ('{"model":"a"}'.encode("utf-16-le"), "the body is not JSON"),
        (b'\xef\xbb\xbf{"model":"a"}', "the body is not a JSON object"),
        (b'{"model":"a"', "the body is not JSON"),
        (b'["model"]', "the body is not a JSON object"),
        (b"", "the body is not a JSON object"),
        (b'{"model":5}', "the model is not a string"),
        (b'{"model":["a"]}', "the model is not a string"),
        (b'{"model":false}', "the model is not a string"),
        (b'{"model":"\\ud800"}', "the model is not Unicode text"),
    ],
)
def test_an_ambiguous_model_says_why(body: bytes, reason: str) -> None:
    asked = read(body)
    assert (asked.surety, asked.model, asked.reason) == ("ambiguous", None, reason)


@pytest.mark.parametrize(("encoding", "surety"), [(b"gzip", "ambiguous"), (b" Identity", "named"), (b"", "named")])
def test_a_compressed_body_is_ambiguous(encoding: bytes, surety: str) -> None:
    """That it is one is all that can be known: vLLM would read it as it came."""
    found = read_request(CHAT, b'{"model":"a"}', JSON, encoding)
    assert found.surety == surety
    assert bool(found.unclear) == (surety == "ambiguous")


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 9}, 9),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None, "n": 3}, 15),
        (CHAT, {"max_tokens": "5", "n": "2"}, 10),
        (CHAT, {"max_tokens": 5, "n": None}, 5),
        (CHAT, {"max_tokens": 5, "n": 0}, 5),
        (CHAT, {"max_tokens": 5, "n": "0" * 200 + "100"}, 500),
        (CHAT, {"max_tokens": -5, "n": -2}, 0),
        (CHAT, {"max_tokens": 5.5}, None),
        (CHAT, {"max_tokens": 10**30, "n": 10**30}, MOST),
        (CHAT, {"max_output_tokens": 5}, None),
        (CHAT + "/batch", {"max_tokens": 5, "n": 2, "messages": [[{}], [{}], [{}]]}, 30),
        (COMPLETIONS, {"prompt": "x"}, 16),
        (COMPLETIONS, {"prompt": "x", "max_completion_tokens": 1}, 16),
        (COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 5, "n": 2}, 20),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        (COMPLETIONS, {"prompt": [[1], [2]], "max_tokens": 5}, 10),
        (COMPLETIONS, {"prompt": "x", "prompt_embeds": ["a", "b"], "max_tokens": 5}, 15),
        (COMPLETIONS, {"max_tokens": 0, "echo": True, "prompt": ""}, 0),
        ("/invocations", {"messages": [{}], "max_completion_tokens": 5, "max_tokens": 9, "n": 3}, 15),
        ("/invocations", {"messages": [{}], "prompt": None}, None),
        ("/invocations", {"prompt": ["x", "y"], "max_completion_tokens": 1, "max_tokens": 5, "n": 2}, 20),
        ("/invocations", {"prompt_embeds": ["a", "b"], "messages": None}, 32),
        ("/invocations", {"input": "x"}, None),
        ("/v1/responses", {"max_output_tokens": 7, "max_tokens": 1, "n": 5}, 7),
        ("/v1/messages", {"max_tokens": 7}, 7),
        ("/v1/embeddings", {"input": "x"}, None),
        ("/inference/v1/generate", {"max_tokens": 1, "sampling_params": {"max_tokens": 7, "n": 2}}, 14),
        ("/inference/v1/generate", {"sampling_params": {"n": 0, "max_tokens": 7}}, 7),
        ("/inference/v1/generate", {"sampling_params": []}, None),
        ("/v1/something-new", {"max_tokens": 5}, None),
    ],
)
def test_output_tokens(path: str, body: dict[str, Any], tokens: int | None) -> None:
    assert read(body, path).output_tokens == tokens


@pytest.mark.parametrize(
    ("body", "stream", "usage"),
    [
        ({}, False, False),
        ({"stream": True}, True, False),
        ({"stream": "true"}, True, False),
        ({"stream": "maybe"}, False, False),
        ({"stream": None}, False, False),
        ({"stream": True, "stream_options": {"include_usage": 1}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": None}}, True, False),
        ({"stream": True, "stream_options": ["include_usage"]}, True, False),
    ],
)
def test_stream_and_usage(body: dict[str, Any], stream: bool, usage: bool) -> None:
    asked = read(body)
    assert (asked.stream, asked.usage) == (stream, usage)


@pytest.mark.parametrize(
    ("body", "end_user"),
    [
        ({"user": "a", "metadata": {"user_id": "b"}, "safety_identifier": "c"}, "a"),
        ({"user": None, "metadata": {"user_id": "b"}, "safety_identifier": "c"}, "b"),
        ({"user": 5, "metadata": "b", "safety_identifier": "c"}, "c"),
        ({"user": " \n\x00", "safety_identifier": "c"}, "c"),
        ({"metadata": {"user_id": ["b"]}}, None),
        ({"user": " a\nb\u202e\ud800é "}, "abé"),
        ({"user": "x" * 5000}, "x" * LONGEST_END_USER),
        ({"user": "\n" * 5000 + "x"}, None),
        ({}, None),
    ],
)
def test_end_user(body: dict[str, Any], end_user: str | None) -> None:
    assert read(body).end_user == end_user


def test_what_is_large_is_not_kept() -> None:
    asked = read({"model": "m", "messages": [{"content": "secret"}], "user": "u", "stream_options": {"a": 1}})
    assert asked.document is not None
    assert asked.document.values == {"stream_options": {"a": 1}}
    assert asked.document.spans.keys() == {"model", "messages", "user", "stream_options"}
    assert "secret" not in repr((asked, asked.document))


def asked(body: bytes | dict[str, Any], path: str = "/v1/chat/completions", kind: bytes = b"application/json") -> Asked:
    return read_request(path, body if isinstance(body, bytes) else json.dumps(body).encode(), kind)


@pytest.mark.parametrize(
    ("body", "unclear"),
    [
        (b'{"model":"m"}', ""),
        (b'{"model":"m",}', ""),  # vLLM refuses it
        (b"[]", ""),
        (b"", ""),
        (b'{"model":"a","model":"b"}', ""),  # what it uses is clear
        (b'{"stream":true,"stream":false}', "stream is given twice"),
        (b'{"max_tokens":1,"m":2,"max_t\\u006fkens":9}', "max_tokens is given twice"),
        (b'{"stream_options":{},"stream_options":null}', "stream_options is given twice"),
        ('{"model":"m"}'.encode("utf-16"), "the body is not UTF-8"),
        (b'\xef\xbb\xbf{"model":"m"}', "the body is not a JSON object"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(1001)) + b"}", "the body has too many members"),
        (b'{"a":[' + b"1," * 1_000_000 + b"1]}", "the body holds too many values"),
        (b'{"stream_options":{"include_usage":false,"include_usage":false}}', "include_usage is given twice"),
        (b'{"stream_options":{"include_usage":false,"include_us\\u0061ge":true}}', "include_usage is given twice"),
        (
            b'{"x":"\xc3\xa9","stream_options":{"continuous_usage_stats":0,"include_usage":0,"continuous_usage_stats":0}}',
            "continuous_usage_stats is given twice",
        ),
        (b'{"stream_options":{"x":1,"x":2}}', ""),
        (
            b'{"stream_options":{' + b",".join(b'"%d":1' % n for n in range(1001)) + b"}}",
            "stream_options cannot be read",
        ),
        # Another Python reads these.
        (b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", "the body is nested too deeply"),
        (b'{"a":' + b"[" * 100_000, "the body is nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "the body holds a number of too many digits"),
        (('{"a":' + "[" * 1000 + "]" * 1000 + "}").encode("utf-16"), "the body is not UTF-8"),
        (('{"a":' + "9" * 5000 + "}").encode("utf-16"), "the body is not UTF-8"),
        (b'{"a":\xff}', ""),  # none does
    ],
)
def test_what_nobody_can_say_the_use_of(body: bytes, unclear: str) -> None:
    assert asked(body).unclear == unclear


def test_what_is_a_chat_or_a_completion_is_unclear() -> None:
    both = {"messages": [{}], "prompt": "x"}
    assert asked(both, "/invocations").unclear == "there are both messages and a prompt"
    assert asked({**both, "prompt": None, "prompt_embeds": ["x"]}, "/invocations").unclear
    assert not asked({**both, "messages": None}, "/invocations").unclear
    assert not asked({**both, "prompt": None}, "/invocations").unclear
    assert not asked(both).unclear


def test_as_many_as_may_be_are_read() -> None:
    body = b"{" + b",".join([*(b'"%d":1' % n for n in range(999)), b'"model":"m"']) + b"}"
    assert asked(body).model == "m"
    assert asked(b'{"model":"m","prompt":[' + b"1," * 900_000 + b"1]}").model == "m"


def test_a_form_of_too_many_parts_or_a_type_that_is_too_long() -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
    many = part * 1001 + b"--b--"
    assert asked(many, "/v1/audio/transcriptions", b"multipart/form-data; boundary=b").unclear
    few = part * 900 + b"--b--"
    assert not asked(few, "/v1/audio/transcriptions", b"multipart/form-data; boundary=b").unclear
    for body in (few, b"{}"):  # whichever of the two it is
        assert asked(body, kind=b"application/json" + b";a" * 600).unclear == "its Content-Type is too long"


def test_a_prompt_is_guessed_by_its_text() -> None:
    text = {"messages": [{"content": "x" * 4000}]}
    assert 1000 <= asked(text).prompt_tokens < 1020
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBO" * 50_000}}
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO" * 50_000}}
    for other in (image, source):
        assert 2024 <= asked({"messages": [{"content": ["x" * 4000, other]}]}).prompt_tokens < 2100
    slashes = json.dumps({"messages": [image]}).replace("iVB", "/9j").replace("/", "\\/")  # as PHP writes them
    assert 1024 <= asked(slashes.encode()).prompt_tokens < 1100
    plain = {"messages": [{"content": "data:image/png;base64," + "to be or not to be " * 500}]}
    assert asked(plain).prompt_tokens > 2000


def test_how_events_are_counted() -> None:
    assert asked({}).interval == 1
    assert asked({"stream_interval": 16}).interval == 16
    assert [asked({"stream_interval": odd}).interval for odd in (0, -3, None, "x", 1.5)] == [1] * 5
    assert [asked({"background": value}).detached for value in (True, "yes", False, None)] == [True, True, False, False]
