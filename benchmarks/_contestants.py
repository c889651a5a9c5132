"""Who is compared, and how each is started: one process or tree of processes on the proxy's core."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _keys import secret_of
from _processes import pin
from _running import HERE, HOST, free_port, process
from attrs import frozen

sys.path.append(str(HERE.parent / "tests"))
from _redis import RedisServer

#: The key's limits in "everything on": each is checked and counted, none is ever reached.
PLENTY = 10**12
LIMITS = {"rpm_limit": PLENTY, "tpm_limit": PLENTY, "max_parallel_requests": PLENTY}
#: What small requests say, of another length each.
PROMPTS = ["Say hello to everybody who waits for a token." + " And again." * times for times in range(8)]
_MASTER = "sk-benchmark-master-key-of-no-value"
#: How the names of variables begin that set something in a contestant; only those set here shall count.
_SETTINGS = ("VLLM", "LITELLM", "HOSTED_VLLM", "REDIS", "STATE_DIRECTORY")
#: The Rust router with the cheapest of its policies, and as it is when it is told nothing.
ROUTER = "vllm-router"
ROUTER_BY_DEFAULT = "vllm-router-default"
#: Streams at a time that each peer has to bear.
_MANY = 20_000

#: With twice the connections that it can have, for it closes idle ones when most are taken.
_NGINX = """
daemon off; worker_processes 1; worker_rlimit_nofile {many}; pid {directory}/nginx.pid; error_log {directory}/error.log;
user {user};
events {{ worker_connections {connections}; }}
http {{
  access_log off; client_max_body_size 0; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  keepalive_requests 1000000000; keepalive_timeout 600s; tcp_nodelay on;
  upstream vllm {{ server {host}:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen {host}:{port} backlog=4096;
    location / {{
      proxy_pass http://vllm; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
      {buffers}
    }}
  }}
}}
"""


@frozen
class Place:
    """Where everything runs.

    :ivar upstream: its port; ``upstream_pid``: its process.
    :ivar load_core: for the generator, the upstream and Redis; ``proxy_core``: for what is measured.
    :ivar peers: the directory of the peers' virtual environments.
    """

    upstream: int
    upstream_pid: int
    load_core: int
    proxy_core: int
    peers: Path


@frozen
class Running:
    """A contestant that answers.

    :ivar pid: its process; ``None`` where there is no proxy. ``redis``: that of its store, where it has one.
    :ivar path: of vLLM's API there; ``fields``: header lines that each request needs.
    :ivar seconds: from its start to its first answer.
    """

    name: str
    port: int
    pid: int | None
    path: str = "/v1"
    fields: str = ""
    redis: int | None = None
    seconds: float = 0.0

    def request(self, model: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Return a chat completion's request. ``body``: what its body has besides the model."""
        data = json.dumps({"model": model, **(_says(PROMPTS[0]) if body is None else body)}).encode()
        head = (
            f"POST {self.path}/chat/completions HTTP/1.1\r\nHost: {HOST}:{self.port}\r\nUser-Agent: benchmark\r\n"
            f"Accept: */*\r\n{self.fields}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def small(self) -> list[bytes]:
        """Return the requests of :data:`PROMPTS`, which a connection asks one after the other."""
        return [self.request("small", _says(prompt)) for prompt in PROMPTS]

    def stream(self, model: str) -> bytes:
        """Return the request for a stream."""
        return self.request(model, {"stream": True, "max_tokens": 1000, **_says(PROMPTS[0])})

    def with_key(self, number: int) -> "Running":
        """Return the same, asked with another key."""
        return Running(self.name, self.port, self.pid, self.path, _bearer(secret_of(number)), self.redis)


#: Starts a contestant, for the length of a ``with``.
Start = Callable[[Place], AbstractContextManager[Running]]


def _says(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]}


def _bearer(key: str) -> str:
    return f"Authorization: Bearer {key}\r\n"


@contextmanager
def direct(place: Place) -> Iterator[Running]:
    """The upstream itself: what the load and the upstream cost."""
    yield Running("direct", place.upstream, None)


#: Makes its buffers as large as large bodies like them.
_LARGE_BUFFERS = (
    "proxy_buffer_size 256k; proxy_buffers 8 256k; proxy_busy_buffers_size 512k; client_body_buffer_size 256k;"
)


@contextmanager
def nginx(place: Place, *, large_buffers: bool = False) -> Iterator[Running]:
    """One worker, connections kept to the upstream, nothing buffered, no access log."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        places = {"directory": directory, "host": HOST, "port": port, "upstream": place.upstream}
        buffers = _LARGE_BUFFERS if large_buffers else ""
        text = _NGINX.format(user=_name_of_user(), many=_MANY, connections=2 * _MANY, buffers=buffers, **places)
        Path(directory, "nginx.conf").write_text(text)
        command = (nginx_binary() or "nginx", "-p", directory, "-c", f"{directory}/nginx.conf")
        with _pinned(place, Running("nginx", port, 0), *command, cwd=directory) as running:
            yield running


def nginx_binary() -> str | None:
    """Return nginx, which Debian keeps where users do not look."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _name_of_user() -> str:
    return subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def vllm_router(place: Place, *options: str, name: str) -> Iterator[Running]:
    """One upstream, no keys, warnings only in its log."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        command = (
            *(str(place.peers / "vllm-router/bin/vllm-router"), "--host", HOST, "--port", str(port)),
            *("--worker-urls", f"http://{HOST}:{place.upstream}", "--log-level", "warning"),
            *("--max-concurrent-requests", str(_MANY), "--prometheus-port", str(free_port()), *options),
        )
        with _pinned(place, Running(name, port, 0), *command, cwd=directory) as running:
            yield running


@contextmanager
def bare(place: Place) -> Iterator[Running]:
    """What Twisted, httptools and Python cost by themselves."""
    port = free_port()
    command = (sys.executable, str(HERE / "_bare.py"), str(port), str(place.upstream))
    with (
        tempfile.TemporaryDirectory() as directory,
        _pinned(place, Running("bare", port, 0), *command, cwd=directory) as running,
    ):
        yield running


@contextmanager
def litellm(place: Place) -> Iterator[Running]:
    """One worker, its /vllm pass-through, the master key only, no database."""
    port = free_port()
    env = {
        "LITELLM_MASTER_KEY": _MASTER,
        "VLLM_API_BASE": f"http://{HOST}:{place.upstream}",
        "HOSTED_VLLM_API_BASE": f"http://{HOST}:{place.upstream}",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    with tempfile.TemporaryDirectory() as directory:
        command = (str(place.peers / "litellm/bin/litellm"), "--host", HOST, "--port", str(port), "--num_workers", "1")
        found = Running("litellm", port, 0, "/vllm/v1", _bearer(_MASTER))
        with _pinned(place, found, *command, cwd=directory, env=env) as running:
            yield running


@contextmanager
def vllmproxy_on(
    place: Place, keys: int = 1, limits: Mapping[str, Any] = LIMITS, workers: int | None = None
) -> Iterator[Running]:
    """Keys in a Redis of its own, limits, exact usage, an access log.

    :param keys: so many are in the store; the first is used unless another is asked for.
    :param limits: fields of each of them.
    """
    with ExitStack() as stack:
        redis = RedisServer()
        stack.callback(redis.remove)
        redis.start()
        redis_pid = int(redis.command("INFO", "server").partition(b"process_id:")[2].split()[0])
        pin(redis_pid, place.load_core)
        add_keys(redis.unix_url, 0, keys, limits)
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        Path(directory, "master-key").write_text(_MASTER)
        options = ("--store", redis.unix_url, "--master-key-file", f"{directory}/master-key", "--usage", "exact")
        options += ("--access-log", f"{directory}/access.jsonl")
        options += ("--workers", str(workers)) if workers else ()
        found = Running("vllmproxy-on", free_port(), 0, "/vllm/v1", _bearer(secret_of(0)), redis_pid)
        yield stack.enter_context(_vllmproxy(place, found, directory, *options))


@contextmanager
def vllmproxy_off(place: Place) -> Iterator[Running]:
    """No keys, so no limits; the access log, which cannot be turned off, is thrown away."""
    with tempfile.TemporaryDirectory() as directory:
        found = Running("vllmproxy-off", free_port(), 0, "/vllm/v1")
        options = ("--store", "memory:", "--usage", "passive", "--access-log", "/dev/null")
        with _vllmproxy(place, found, directory, *options) as running:
            yield running


def add_keys(url: str, first: int, count: int, fields: Mapping[str, Any]) -> None:
    """Put keys into a store."""
    command = [sys.executable, str(HERE / "_keys.py"), url, str(first), str(count), json.dumps(fields)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def _vllmproxy(place: Place, running: Running, directory: str, *options: str) -> Iterator[Running]:
    command = (
        *(str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile=", "vllmproxy"),
        *("--upstream", f"http://{HOST}:{place.upstream}", "--listen", f"tcp:{running.port}:interface={HOST}"),
        *("--state-directory", directory, "--drain-timeout", "1", *options),
    )
    with _pinned(place, running, *command, cwd=directory) as started:
        yield started


@contextmanager
def _pinned(
    place: Place, running: Running, *command: str, cwd: str, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Run a proxy on its core; begins when it has answered a request."""
    began = time.monotonic()
    whole = ("taskset", "-c", str(place.proxy_core), *command)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    with process(*whole, port=running.port, cwd=cwd, env={**clean, **(env or {})}, seconds=180) as child:
        _ask_until_answered(running, began + 180)
        took = time.monotonic() - began
        yield Running(running.name, running.port, child.pid, running.path, running.fields, running.redis, took)


def _ask_until_answered(running: Running, deadline: float) -> None:
    head, _, body = running.request("small").partition(b"\r\n\r\n")
    url = f"http://{HOST}:{running.port}{running.path}/chat/completions"
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, fields), timeout=10) as answer:
                answer.read()
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{running.name} does not answer: {error}") from None
            time.sleep(0.01)


#: In the order of the tables.
CONTESTANTS: dict[str, Start] = {
    "direct": direct,
    "nginx": nginx,
    ROUTER: lambda place: vllm_router(place, "--policy", "round_robin", name=ROUTER),
    ROUTER_BY_DEFAULT: lambda place: vllm_router(place, name=ROUTER_BY_DEFAULT),
    "litellm": litellm,
    "bare": bare,
    "vllmproxy-on": vllmproxy_on,
    "vllmproxy-off": vllmproxy_off,
}
#: Those whose process is ours.
OURS = ("vllmproxy-on", "vllmproxy-off")
