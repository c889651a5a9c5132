"""What the ``openai`` and ``anthropic`` SDKs raise when a key does not open, or is used up: their own typed errors."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from _asking import ask, make_key
from _service import MASTER_KEY, Twistd, start_proxy

MODEL = "qwen2.5-7b-instruct"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
AT_ONCE = {"X-Vllmsim": "ttft=0; tpot=0"}

#: Asks a proxy with a key, and either SDK.
Ask = Callable[[Twistd, str], object]


@pytest.fixture(scope="module")
def priced(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    directory: Path = tmp_path_factory.mktemp("priced")
    (directory / "prices.toml").write_text('[models."*"]\ninput = 1000\noutput = 1000\n')
    service = start_proxy(directory, sim.url, "--store", "memory:", "--prices", str(directory / "prices.toml"))
    yield service
    service.stop()
    assert "Traceback" not in service.log


@cache
def _openai() -> openai.OpenAI:
    return openai.OpenAI(base_url="http://nowhere", api_key="none", max_retries=0, default_headers=AT_ONCE)


@cache
def _anthropic() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url="http://nowhere", api_key="none", max_retries=0, default_headers=AT_ONCE)


@pytest.fixture(scope="module", autouse=True)
def _clients() -> Iterator[None]:
    """What makes a client slow to make, its certificates and connections, is shared."""
    yield
    _openai().close()
    _anthropic().close()


def openai_for(service: Twistd, key: str) -> openai.OpenAI:
    return _openai().with_options(base_url=f"{service.url}/vllm/v1", api_key=key)


def anthropic_for(service: Twistd, key: str) -> anthropic.Anthropic:
    return _anthropic().with_options(base_url=f"{service.url}/vllm", api_key=key)


def chat(service: Twistd, key: str) -> object:
    return openai_for(service, key).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)


def chat_streamed(service: Twistd, key: str) -> object:
    client = openai_for(service, key)
    return list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, stream=True))


def complete(service: Twistd, key: str) -> object:
    return openai_for(service, key).completions.create(model=MODEL, prompt="hello", max_tokens=5)


def respond(service: Twistd, key: str) -> object:
    return openai_for(service, key).responses.create(model=MODEL, input="hello", max_output_tokens=5)


def message(service: Twistd, key: str) -> object:
    return anthropic_for(service, key).messages.create(model=MODEL, messages=HELLO, max_tokens=5)


def message_streamed(service: Twistd, key: str) -> object:
    with anthropic_for(service, key).messages.stream(model=MODEL, messages=HELLO, max_tokens=5) as stream:
        return stream.get_final_message()


openais = pytest.mark.parametrize("asking", [chat, chat_streamed, complete, respond])
anthropics = pytest.mark.parametrize("asking", [message, message_streamed])

UNKNOWN = "sk-nobody-has-this-key-at-all"
#: What the message says in each case.
NOT_KNOWN = "Authentication Error, Invalid proxy server token passed."
NOT_ALLOWED = f"This key is not allowed to use the model '{MODEL}'. It may use: another-model."
SPENT = "Budget has been exceeded! {} of {} are left"
LIMITED = "Limit type: {}. Current limit: {}, Remaining: "


def raised_by_openai(asking: Ask, service: Twistd, key: str, status: type[openai.APIStatusError]) -> Any:
    """Return the error, which must be of just that class."""
    with pytest.raises(openai.APIStatusError) as caught:
        asking(service, key)
    assert type(caught.value) is status
    assert caught.value.status_code == status.status_code  # type: ignore[attr-defined]
    assert caught.value.code == str(caught.value.status_code)
    return caught.value


def raised_by_anthropic(asking: Ask, service: Twistd, key: str, status: type[anthropic.APIStatusError]) -> Any:
    """Return the error, which must be of just that class."""
    with pytest.raises(anthropic.APIStatusError) as caught:
        asking(service, key)
    assert type(caught.value) is status
    body: Any = caught.value.body
    assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
    assert body["error"]["message"] in str(caught.value)
    return caught.value


@openais
def test_openai_an_unknown_key(priced: Twistd, asking: Ask) -> None:
    error = raised_by_openai(asking, priced, UNKNOWN, openai.AuthenticationError)
    assert NOT_KNOWN in error.message
    assert UNKNOWN not in str(error)


@anthropics
def test_anthropic_an_unknown_key(priced: Twistd, asking: Ask) -> None:
    error = raised_by_anthropic(asking, priced, UNKNOWN, anthropic.AuthenticationError)
    assert NOT_KNOWN in error.message
    assert UNKNOWN not in str(error)
    assert error.body["error"]["type"] == "authentication_error"


def test_a_blocked_key(priced: Twistd) -> None:
    key = make_key(priced)["key"]
    assert ask(priced, "POST", "/key/block", {"key": key}, key=MASTER_KEY).status == 200
    assert "Key is blocked." in raised_by_openai(chat, priced, key, openai.AuthenticationError).message
    assert "Key is blocked." in raised_by_anthropic(message, priced, key, anthropic.AuthenticationError).message


@openais
def test_openai_a_model_that_is_not_allowed(priced: Twistd, asking: Ask) -> None:
    key = make_key(priced, models=["another-model"])["key"]
    error = raised_by_openai(asking, priced, key, openai.PermissionDeniedError)
    assert NOT_ALLOWED in error.message
    assert (error.type, error.param) == ("key_model_access_denied", "model")


@anthropics
def test_anthropic_a_model_that_is_not_allowed(priced: Twistd, asking: Ask) -> None:
    key = make_key(priced, models=["another-model"])["key"]
    error = raised_by_anthropic(asking, priced, key, anthropic.PermissionDeniedError)
    assert NOT_ALLOWED in error.message
    assert error.body["error"]["type"] == "permission_error"


#: Budgets that the first request does not fit in, and how the refusal calls them.
BUDGETS = [({"max_budget_tokens": 6}, "6 tokens"), ({"max_budget": 0.006}, "0.006")]
budgets = pytest.mark.parametrize(("fields", "called"), BUDGETS, ids=["tokens", "money"])


@openais
@budgets
def test_openai_a_budget_that_is_used_up(priced: Twistd, asking: Ask, fields: dict[str, object], called: str) -> None:
    key = make_key(priced, **fields)["key"]
    error = raised_by_openai(asking, priced, key, openai.UnprocessableEntityError)
    assert SPENT.format(called, called) in error.message
    assert error.type == "budget_exceeded"


@anthropics
@budgets
def test_anthropic_a_budget_that_is_used_up(
    priced: Twistd, asking: Ask, fields: dict[str, object], called: str
) -> None:
    key = make_key(priced, **fields)["key"]
    error = raised_by_anthropic(asking, priced, key, anthropic.UnprocessableEntityError)
    assert SPENT.format(called, called) in error.message
    assert error.body["error"]["type"] == "invalid_request_error"


#: Limits that hold one request up, kind and number as the refusal calls them.
LIMITS = [
    ({"rpm_limit": 1}, "requests", 1),
    ({"tpm_limit": 60}, "tokens", 60),
    ({"model_rpm_limit": {MODEL: 1}}, "requests", 1),
    ({"model_tpm_limit": {MODEL: 60}}, "tokens", 60),
]
limits = pytest.mark.parametrize(("fields", "kind", "limit"), LIMITS, ids=str)


def refuse_at_last(asking: Ask, service: Twistd, key: str) -> None:
    """Ask until the limit is reached; what is refused is raised."""
    for _ in range(60):
        asking(service, key)


@openais
@limits
def test_openai_a_limit(priced: Twistd, asking: Ask, fields: dict[str, object], kind: str, limit: int) -> None:
    key = make_key(priced, **fields)["key"]

    def exhaust(service: Twistd, key: str) -> None:
        refuse_at_last(asking, service, key)

    error = raised_by_openai(exhaust, priced, key, openai.RateLimitError)
    assert LIMITED.format(kind, limit) in error.message
    assert error.type == "rate_limit_error"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert error.response.headers["rate_limit_type"] == kind


@anthropics
@limits
def test_anthropic_a_limit(priced: Twistd, asking: Ask, fields: dict[str, object], kind: str, limit: int) -> None:
    key = make_key(priced, **fields)["key"]

    def exhaust(service: Twistd, key: str) -> None:
        refuse_at_last(asking, service, key)

    error = raised_by_anthropic(exhaust, priced, key, anthropic.RateLimitError)
    assert LIMITED.format(kind, limit) in error.message
    assert error.body["error"]["type"] == "rate_limit_error"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60


@pytest.mark.parametrize("status", [402, 429])
def test_a_status_that_the_operator_chose(sim: Twistd, tmp_path: Path, status: int) -> None:
    service = start_proxy(tmp_path, sim.url, "--store", "memory:", "--budget-status", str(status))
    try:
        key = make_key(service, max_budget_tokens=6)["key"]
        with pytest.raises(openai.APIStatusError, match="Budget has been exceeded!") as caught:
            chat(service, key)
        assert caught.value.status_code == status
        assert caught.value.type == "budget_exceeded"
        with pytest.raises(anthropic.APIStatusError, match="Budget has been exceeded!") as told:
            message(service, key)
        assert told.value.status_code == status
    finally:
        service.stop()
