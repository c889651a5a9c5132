"""Canaries: distinctive secrets put in every place a request has, and then looked for in everything that is kept."""

import base64
import hashlib
import http.client
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _asking import CHAT, ask, bearer, until
from _ports import free_port
from _redis import RedisServer, redis_server
from _service import Twistd, start_proxy, start_simulator
from test_service_refusals import refused

MASTER = "sk-canary-master-Zq81vWm3"
VIRTUAL = "sk-canary-virtual-Xp27nTk9"
UPSTREAM = "sk-canary-upstream-Ju64bRe5"
STRANGER = "sk-canary-stranger-Hd30cYo1"
PROMPT = "canary-prompt-Lw95sGa2"
PASSWORD = "canary-password-Fb46mVi8"
SECRETS = (MASTER, VIRTUAL, UPSTREAM, STRANGER, PROMPT, PASSWORD)
CHAT_PATH = "/vllm/v1/chat/completions"

#: Where a key may stand, rightly or wrongly.
_PLACES = (
    "Authorization: Bearer {}",
    "Authorization: Basic {}",
    "Authorization: {}",
    "Authorization: Bearer {} and more",
    "Authorization: Bearer {}\x01",
    "x-api-key: {}",
    "x-litellm-api-key: {}",
    "API-Key: {}",
    "x-api-key: {}\r\nx-api-key: another",
    "Cookie: session={}",
    "Proxy-Authorization: Basic {}",
    "X-Request-Id: {} {}",
    "User-Agent: {}",
    "Referer: http://a/?key={}",
    "x-made-up: {}",
    "{}: x",
    "Host: {}",
    "Expect: {}",
    "Transfer-Encoding: {}",
    "Content-Length: {}",
    "Connection: {}",
)
_PATHS = (
    "/vllm/v1/models",
    "/vllm/v1/models?key={}",
    "/vllm/sleep",
    "/key/info?key={}",
    "/key/info",
    "/metrics?{}",
    "/key/{}/regenerate",
)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server("--requirepass", PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def told(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Twistd, list[bytes]]]:
    """A proxy that has seen all of it, and every error body it gave."""
    directory = tmp_path_factory.mktemp("canary")
    (directory / "upstream-key").write_text(UPSTREAM)
    sim = start_simulator(directory / "sim", "--api-key-file", str(directory / "upstream-key"))
    env = {"VLLMPROXY_MASTER_KEY": MASTER, "VLLM_API_KEY": UPSTREAM}
    env["VLLMPROXY_STORE"] = f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0"
    service = start_proxy(directory / "proxy", sim.url, env=env)
    errors: list[bytes] = []
    ask(service, "POST", "/key/generate", {"key": VIRTUAL}, key=MASTER)
    for secret in (VIRTUAL, MASTER, STRANGER):
        errors += _wander(service, secret)
    errors += _fail(service)
    redis.kill()
    errors += [ask(service, "GET", "/vllm/v1/models", key=key).body for key in (STRANGER, VIRTUAL)]
    errors += [ask(service, "POST", "/key/generate", {"key": STRANGER}, key=MASTER).body]
    sim.stop()
    errors += [ask(service, "POST", CHAT_PATH, _prompt(), key=MASTER).body]
    until(lambda: "upstream_unreachable" in (directory / "proxy" / "access.jsonl").read_text())  # the last record
    yield service, errors
    service.stop()


def _prompt() -> dict[str, object]:
    return {**CHAT, "messages": [{"role": "user", "content": PROMPT}], "user": PROMPT, "metadata": {"user_id": PROMPT}}


def _wander(service: Twistd, secret: str) -> list[bytes]:
    """Put ``secret`` everywhere, and return the bodies of those answers that are errors."""
    answers = [
        _by_hand(service, path.format(secret), line.format(secret, secret)) for path in _PATHS for line in _PLACES
    ]
    for path in ("/key/generate", "/key/delete", CHAT_PATH, "/vllm/tokenize"):
        for body in (
            {"key": secret + "!"},
            {"keys": [secret + "?"]},
            {"duration": secret},
            {"models": secret},
        ):
            answers.append((ask(service, "POST", path, body, key=MASTER).body, False))
        answers.append((ask(service, "POST", path, f"{{{secret}".encode(), key=MASTER).body, path.startswith("/vllm")))
    return [body for body, from_vllm in answers if not from_vllm and b'"error"' in body]


def _by_hand(service: Twistd, path: str, line: str) -> tuple[bytes, bool]:
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n{line}\r\nConnection: close\r\n\r\n"
    with service.connect() as sock:
        sock.sendall(request.encode("latin-1"))
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return body, b"server: uvicorn" in head.lower() or not head.startswith(b"HTTP/1.1 4")


def _fail(service: Twistd) -> list[bytes]:
    """Prompts through every kind of failure."""
    bodies = []
    for directive in ("", "garbage", "close-before-head", "reset-before-head", "die; after=50", "broken-chunk"):
        headers = {"X-Vllmsim": directive} if directive else {}
        try:
            bodies.append(ask(service, "POST", f"{CHAT_PATH}?q={PROMPT}", _prompt(), key=VIRTUAL, headers=headers).body)
        except (OSError, http.client.HTTPException):
            continue  # it was cut off, as it has to be
    return [body for body in bodies if b'"error"' in body]


def _all_forms(secret: str) -> list[str]:
    return [
        secret,
        base64.b64encode(secret.encode()).decode().rstrip("="),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    ]


def _spill(text: str) -> list[str]:
    return [
        f"{secret}: …{text[max(0, at - 200) : at + 60]}…"
        for secret in SECRETS
        for at in [_find(text, secret)]
        if at >= 0
    ]


def _find(text: str, secret: str) -> int:
    return max(text.lower().find(form.lower()) for form in _all_forms(secret))


def test_the_session_reached_what_it_should(told: tuple[Twistd, list[bytes]]) -> None:
    service, errors = told
    statuses = {record["status"] for record in service.access_records}
    assert {200, 400, 401, 403, 404, 502, 503} <= statuses
    assert len(errors) > 100


def test_no_secret_in_the_access_log(told: tuple[Twistd, list[bytes]]) -> None:
    service, _ = told
    assert not _spill((service.directory / "access.jsonl").read_text())


def test_no_secret_in_twistd_s_log(told: tuple[Twistd, list[bytes]]) -> None:
    service, _ = told
    assert "made" in service.log
    assert not _spill(service.log)
    assert "Traceback" not in service.log


def test_no_secret_in_the_metrics(told: tuple[Twistd, list[bytes]]) -> None:
    service, _ = told
    assert not _spill(ask(service, "GET", "/metrics", headers=bearer(MASTER)).body.decode())


def test_no_secret_in_an_error(told: tuple[Twistd, list[bytes]]) -> None:
    _, errors = told
    assert not [spill for body in errors for spill in _spill(body.decode())]


def test_no_secret_in_a_refusal_to_start(tmp_path: Path) -> None:
    upstream = ("--upstream", "http://127.0.0.1:9")
    env = {"VLLMPROXY_MASTER_KEY": MASTER, "VLLM_API_KEY": UPSTREAM}
    for number, store in enumerate((f"redis://u:{PASSWORD}@127.0.0.1:{free_port()}", f"redys://u:{PASSWORD}@h")):
        refused(tmp_path / str(number), *upstream, "--store", store, env=env)
        assert not _spill((tmp_path / str(number) / "out").read_text() + (tmp_path / str(number) / "err").read_text())


# what is kept of keys, limits and usage


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Everything that a proxy keeps or shows after a session with limits, budgets and a kill -9, by name."""
    directory = tmp_path_factory.mktemp("kept")
    sim = start_simulator(directory / "sim", "--ttft", "0", "--tpot", "0")
    with redis_server("--requirepass", PASSWORD, "--rdbcompression", "no") as redis:
        url = f"redis://:{PASSWORD}@127.0.0.1:{redis.port}/0"
        store = url if request.param == "redis" else f"sqlite:{directory / 'proxy' / 'keys.sqlite'}"
        env = {"VLLMPROXY_MASTER_KEY": MASTER, "VLLMPROXY_STORE": store}
        service = start_proxy(directory / "proxy", sim.url, "--usage", "exact", env=env)
        shown = {"errors": b"\n".join(_use(service))}
        for path in ("/usage?group_by=day,key,model,end_user", "/usage?group_by=key&format=csv", "/audit?limit=100"):
            shown[path] = ask(service, "GET", path, key=MASTER).body
        shown["/key/list"] = ask(service, "GET", "/key/list?return_full_object=true&size=100", key=MASTER).body
        shown["/metrics"] = ask(service, "GET", "/metrics", key=MASTER).body
        with service.connect() as client:
            client.sendall(_stalling())
            assert client.recv(100)
            until(lambda: service.access_records)  # they are written ten times a second
            service.stop(signal.SIGKILL)
        if request.param == "redis":
            assert redis.command("SAVE", login=(PASSWORD,)).startswith(b"+OK")
            shown["dump.rdb"] = (redis.directory / "dump.rdb").read_bytes()
    sim.stop()
    for path in (directory / "proxy").rglob("*"):
        if path.is_file():
            shown[path.name] = path.read_bytes()
    return shown


def _use(service: Twistd) -> list[bytes]:
    """Reach limits and budgets, and let requests fail, with prompts in all of them. Returns the errors."""
    token = hashlib.sha256(VIRTUAL.encode()).hexdigest()
    limits = {
        "tpm_limit": 10**6,
        "max_budget_tokens": 10**6,
        "key_alias": "canary",
        "model_rpm_limit": {CHAT["model"]: 30},
    }
    answers = [ask(service, "POST", "/key/generate", {"key": VIRTUAL, **limits}, key=MASTER)]
    assert answers[0].status == 200
    answers += [ask(service, "POST", "/key/generate", {"key": STRANGER, "models": ["other"]}, key=MASTER)]
    for body in (_chat(), {**_chat(), "stream": True}, {**_chat(), "model": None}, {**_chat(), "n": PROMPT}):
        answers += [ask(service, "POST", CHAT_PATH, body, key=key) for key in (VIRTUAL, STRANGER, MASTER)]
    for directive in ("garbage", "close-before-head", "status; code=500"):
        answers += [ask(service, "POST", CHAT_PATH, _chat(), key=VIRTUAL, headers={"X-Vllmsim": directive})]
    answers += [ask(service, "POST", CHAT_PATH, f"{{{PROMPT}".encode(), key=key) for key in (VIRTUAL, STRANGER)]
    answers += [ask(service, "POST", CHAT_PATH, _chat(), key=VIRTUAL) for _ in range(30)]
    answers += [ask(service, "POST", "/key/update", {"key": VIRTUAL, "max_budget_tokens": 1}, key=MASTER)]
    answers += [ask(service, "POST", CHAT_PATH, _chat(), key=VIRTUAL)]
    answers += [ask(service, "POST", f"/key/{VIRTUAL}/reset_spend", {"reset_to": 0.0}, key=MASTER)]
    answers += [
        ask(
            service,
            "POST",
            "/key/update",
            {"key": VIRTUAL, "max_budget_tokens": None, "model_rpm_limit": {}},
            key=MASTER,
        )
    ]
    assert {200, 400, 403, 422, 429, 500, 502} <= {answer.status for answer in answers}
    until(lambda: token in ask(service, "GET", "/usage?group_by=key", key=MASTER).body.decode())
    # An error of vLLM's may say what is wrong with a request; its shape tells it from one of ours.
    return [answer.body for answer in answers if answer.status >= 400 and not isinstance(answer.error["code"], int)]


def _chat() -> dict[str, object]:
    """A prompt, and no name of an end user, which is there to be shown."""
    return {**CHAT, "messages": [{"role": "user", "content": PROMPT}]}


def _stalling() -> bytes:
    body = json.dumps({**_chat(), "stream": True})
    lines = f"Host: a\r\nx-api-key: {VIRTUAL}\r\nX-Vllmsim: stall; after=10\r\nContent-Type: application/json"
    return f"POST {CHAT_PATH} HTTP/1.1\r\n{lines}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def test_no_secret_in_what_is_kept(kept: dict[str, bytes]) -> None:
    assert not {name: spill for name, data in kept.items() if (spill := _spill(data.decode("latin-1")))}


def test_it_was_looked_for_where_things_are_kept(kept: dict[str, bytes]) -> None:
    """Keys are there by their hash alone: in the journal, the store, the sums, the audit trail, the access log."""
    token = hashlib.sha256(VIRTUAL.encode()).hexdigest().encode()
    (journal,) = [data for name, data in kept.items() if name.endswith(".journal")]
    assert journal.splitlines()[-1].startswith(b'["+"')
    store = (
        kept["dump.rdb"]
        if "dump.rdb" in kept
        else b"".join(kept[name] for name in kept if name.startswith("keys.sqlite"))
    )
    csv = kept["/usage?group_by=key&format=csv"]
    for place in (journal, store, csv, kept["/audit?limit=100"], kept["/key/list"], kept["access.jsonl"], kept["out"]):
        assert token in place
    assert b'"master"' in kept["/usage?group_by=day,key,model,end_user"]
    assert kept["errors"].count(b'"error"') > 10
