"""The ``openai`` and ``anthropic`` SDKs as clients of a real proxy, with nothing but a base URL and a virtual key."""

import asyncio
import io
import wave
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from _asking import ask, make_key, until
from _ports import free_port
from _service import Twistd, start_proxy

MODEL = "qwen2.5-7b-instruct"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def key(proxy: Twistd) -> str:
    made: str = make_key(proxy)["key"]
    return made


@pytest.fixture(scope="module", params=["/vllm/v1", "/vllm"])
def client(request: pytest.FixtureRequest, proxy: Twistd, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=proxy.url + request.param, api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(proxy: Twistd, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"{proxy.url}/vllm", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy whose upstream is not there."""
    service = start_proxy(tmp_path_factory.mktemp("lonely"), f"http://127.0.0.1:{free_port()}")
    yield service
    service.stop()


# openai


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *_, last = stream
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=5)
    assert answer.choices[0].text
    chunks = list(client.completions.create(model=MODEL, prompt="hello", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hello", max_output_tokens=5)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 5


def test_responses_streamed(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="hello", max_output_tokens=5, stream=True))
    assert events[0].type == "response.created"
    assert sum(event.type == "response.output_text.delta" for event in events) == 5
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=["hello", "world"])
    assert len(answer.data) == 2
    assert answer.data[0].embedding


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_transcription(client: openai.OpenAI) -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(32000))
    answer = client.audio.transcriptions.create(model=MODEL, file=("speech.wav", sound.getvalue(), "audio/wav"))
    assert answer.text == "the quick brown fox"


def test_the_errors_of_vllm_are_the_sdk_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=None)  # type: ignore[arg-type]


def test_a_wrong_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="sk-not-a-key-of-this-proxy").models.list()
    assert caught.value.type == "token_not_found_in_db"
    assert caught.value.body["message"].startswith("Authentication Error, Invalid proxy server token passed.")  # type: ignore[index]


def test_a_route_for_the_master_key_only(proxy: Twistd, key: str) -> None:
    with openai.OpenAI(base_url=f"{proxy.url}/vllm/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            client.post("/load_lora_adapter", body={"lora_name": "a"}, cast_to=object)
        assert caught.value.code == "403"


def test_an_unsafe_path(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="path"):
        client.models.retrieve("a;b")


def test_no_upstream(lonely: Twistd) -> None:
    key = make_key(lonely)["key"]
    with openai.OpenAI(base_url=f"{lonely.url}/vllm/v1", api_key=key, max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.status_code == 503
        assert caught.value.type == "upstream_unreachable"


def test_an_answer_that_breaks_off_does_not_look_whole(client: openai.OpenAI) -> None:
    broken = {"X-Vllmsim": "die; after=1500; tokens=50"}
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=50, stream=True, extra_headers=broken
    )
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    with pytest.raises((openai.APIConnectionError, httpx.TransportError)):  # the latter: SDKs before 3
        list(stream)


def _aborts(sim: Twistd) -> int:
    count: int = ask(sim, "GET", "/vllmsim/stats").json()["aborts"]
    return count


def test_closing_a_stream_aborts_at_vllm(client: openai.OpenAI, sim: Twistd) -> None:
    before = _aborts(sim)
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: _aborts(sim) == before + 1)


def test_async_openai(proxy: Twistd, sim: Twistd, key: str) -> None:
    async def story() -> None:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/vllm/v1", api_key=key, max_retries=0) as client:
            asked = [client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5) for _ in range(8)]
            for answer in await asyncio.gather(*asked):
                assert answer.choices[0].message.content
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, stream=True)
            assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"
            long = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000, stream=True)
            await anext(aiter(long))
            await long.close()

    before = _aborts(sim)
    asyncio.run(story())
    until(lambda: _aborts(sim) == before + 1)


# anthropic


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.usage.output_tokens == 5


def test_messages_streamed(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, messages=HELLO, max_tokens=5) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()
    assert text
    assert whole.usage.output_tokens == 5
    assert whole.stop_reason == "max_tokens"


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    assert claude.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens >= 1


def test_closing_a_message_stream_aborts_at_vllm(claude: anthropic.Anthropic, sim: Twistd) -> None:
    before = _aborts(sim)
    with claude.messages.stream(model=MODEL, messages=HELLO, max_tokens=5000) as stream:
        next(iter(stream.text_stream))
    until(lambda: _aborts(sim) == before + 1)


def test_a_wrong_key_in_anthropic_s_shape(claude: anthropic.Anthropic) -> None:
    stranger = claude.with_options(api_key="sk-not-a-key-of-this-proxy")
    with pytest.raises(anthropic.AuthenticationError) as caught:
        stranger.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"
    assert body["error"]["message"].startswith("Authentication Error, Invalid proxy server token passed.")


def test_a_route_for_the_master_key_only_raises_anthropic_s_error(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.PermissionDeniedError):
        claude.post("/sleep", cast_to=object)


def test_an_unknown_model_is_vllm_s_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="no-such-model", messages=HELLO, max_tokens=5)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert "no-such-model" in body["error"]["message"]


def test_no_upstream_in_anthropic_s_shape(lonely: Twistd) -> None:
    key = make_key(lonely)["key"]
    with anthropic.Anthropic(base_url=f"{lonely.url}/vllm", api_key=key, max_retries=0) as client:
        with pytest.raises(anthropic.InternalServerError) as caught:
            client.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
        body: Any = caught.value.body
        assert caught.value.status_code == 503
        assert body["type"] == "error"
        assert body["error"]["type"] == "api_error"


def test_async_anthropic(proxy: Twistd, key: str) -> None:
    async def story() -> None:
        async with anthropic.AsyncAnthropic(base_url=f"{proxy.url}/vllm", api_key=key, max_retries=0) as client:
            answer = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=5)
            assert answer.usage.output_tokens == 5
            async with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=5) as stream:
                assert "".join([text async for text in stream.text_stream])

    asyncio.run(story())
