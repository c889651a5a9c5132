"""The shortest way through everything: a real proxy, a real simulator, one request."""

from _service import MASTER_KEY, Twistd

AUTH = {"Authorization": f"Bearer {MASTER_KEY}"}


def test_a_request_passes(proxy: Twistd) -> None:
    answer = proxy.get_json("/vllm/v1/models", headers=AUTH)
    assert isinstance(answer, dict)
    assert answer["object"] == "list"


def test_a_key_is_made_and_opens_the_door(proxy: Twistd) -> None:
    made = proxy.get_json("/key/generate", method="POST", headers=AUTH)
    assert isinstance(made, dict)
    answer = proxy.get_json("/vllm/v1/models", headers={"x-api-key": made["key"]})
    assert isinstance(answer, dict)
    assert answer["object"] == "list"
