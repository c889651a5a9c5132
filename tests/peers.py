"""Ask other proxies what the corpus asks: ``python tests/peers.py [DIRECTORY...]`` prints a table for the docs.

HAProxy, nginx, Caddy and Envoy are started as plain reverse proxies on loopback, with few settings each, in front of
the counting upstream that the tests use. They are looked for in ``PATH`` and in the directories named; one that is not
found is left out, and so are the cases that are rules of this proxy's only.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from _corpus import KEY, Forwarded, RequestCase, load
from _ports import free_port
from _raw import Message, Upstream
from _service import MASTER_KEY, start_proxy
from _wire import ask
from _witness import Witness, answers_in, converse
from attrs import define, frozen

#: Seconds for an answer; none of them needs a tenth of it.
SECONDS = 4.0

HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend wire
    bind 127.0.0.1:{port}
    default_backend counted
backend counted
    server one 127.0.0.1:{upstream}
"""

NGINX = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
        }}
    }}
}}
"""

CADDY = """
{{
    admin off
    auto_https off
    persist_config off
}}
http://:{port} {{
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:{upstream}
}}
"""

ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: wire
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: counted}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: counted
    type: STATIC
    load_assignment:
      cluster_name: counted
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""


@frozen
class Recipe:
    """How a peer is started.

    :ivar version: the arguments that make it print its version.
    :ivar arguments: to run it with ``{config}``.
    """

    name: str
    program: str
    version: tuple[str, ...]
    config: str
    arguments: tuple[str, ...]


RECIPES = [
    Recipe("HAProxy", "haproxy", ("-v",), HAPROXY, ("-db", "-f", "{config}")),
    Recipe("nginx", "nginx", ("-v",), NGINX, ("-c", "{config}")),
    Recipe("Caddy", "caddy", ("version",), CADDY, ("run", "--adapter", "caddyfile", "--config", "{config}")),
    Recipe("Envoy", "envoy", ("--version",), ENVOY, ("--base-id", "77", "-l", "off", "-c", "{config}")),
]


@define
class Peer:
    """A proxy that is running.

    :ivar prefix: what it leaves of ``/vllm`` in front of a target.
    """

    name: str
    version: str
    port: int
    stop: Callable[[], object]
    prefix: bytes = b"/vllm"


def start(recipe: Recipe, directory: Path, upstream: int, places: str) -> Peer | None:
    """Start a peer; ``None`` where it is not installed."""
    program = shutil.which(recipe.program, path=places)
    if program is None:
        return None
    said = subprocess.run([program, *recipe.version], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+\.\d+", said.stdout + said.stderr)
    port, config = free_port(), directory / "config.yaml"
    config.write_text(recipe.config.format(port=port, upstream=upstream, directory=directory))
    arguments = [each.format(config=config) for each in recipe.arguments]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [program, *arguments], cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def stop() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()

    for _ in range(600):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return Peer(recipe.name, found[0] if found else "?", port, stop)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    stop()
    raise SystemExit(f"{recipe.name} does not start: {(directory / 'log').read_text()}")


def start_ours(directory: Path, upstream: Upstream) -> Peer:
    """Start this proxy, with the corpus's key."""
    service = start_proxy(directory, upstream.url, "--store", "memory:")
    body = json.dumps({"key": KEY}).encode()
    ask(service, "/key/generate", "Content-Type: application/json", method="POST", body=body, key=MASTER_KEY)
    version = service.get_json("/health/readiness")
    found = re.search(r"\d+\.\d+\.\d+", json.dumps(version))
    return Peer("vllmproxy", found[0] if found else "", service.port, service.stop, b"")


def holds(peer: Peer, upstream: Upstream, case: RequestCase) -> bool:
    """Send a case to a peer, and tell whether what comes of it is allowed for any proxy."""
    witness = Witness()
    passes = 200 in case.status
    count = len(case.forwarded) + (not passes)
    bodiless = case.wire.startswith(b"HEAD ")
    try:
        with upstream.playing(witness), socket.create_connection(("127.0.0.1", peer.port), timeout=SECONDS) as sock:
            heard, how = converse(
                sock, case.wire, lambda data: len(answers_in(data, bodiless=bodiless)[0]) >= count, SECONDS
            )
        answers, _ = answers_in(heard, bodiless=bodiless, ended=how in ("fin", "reset"))
    except (AssertionError, OSError, ValueError):  # neither side's bytes can be read
        return False
    if passes:
        return [each.status for each in answers] == [200] * count and arrived(peer, case, witness)
    if witness.bytes == 0 or (case.late and not witness.whole):
        return bool(answers) and answers[-1].status >= 400
    return (
        case.repair is not None
        and len(witness.whole) <= 1
        and witness.partial == 0
        and not re.search(b"(?i)" + case.repair, witness.raw)
    )


def arrived(peer: Peer, case: RequestCase, witness: Witness) -> bool:
    """Tell whether the upstream saw the requests that it was to see, and nothing else."""
    if len(witness.whole) != len(case.forwarded) or witness.partial:
        return False
    return all(is_as_sent(peer, *each) for each in zip(witness.whole, case.forwarded, strict=True))


def is_as_sent(peer: Peer, message: Message, wanted: Forwarded) -> bool:
    """Tell whether a request arrived as it was sent; an absolute form may stay one."""
    method, _, target = wanted.start.partition(b" ")
    lines = message.head.replace(b"\r\n", b"\n")
    return (
        message.start.startswith(method + b" ")
        and re.sub(rb"\A(?i:http)://[^/]*", b"", message.target) == peer.prefix + target
        and message.body == wanted.body
        and all(re.search(b"(?im)" + pattern, lines) for pattern in wanted.has)
    )


def table(rows: list[list[str]]) -> str:
    """Return rows as a table in reStructuredText, the first one its heading."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main(places: str) -> None:
    """Run every generic case against every peer, and print how many each holds, by part."""
    cases = [case for case in load().requests if not case.ours]
    parts = list(dict.fromkeys(case.part for case in cases))
    upstream = Upstream()
    peers, failed = [], {}
    with tempfile.TemporaryDirectory() as name:
        for recipe in [None, *RECIPES]:
            directory = Path(name) / (recipe.program if recipe else "ours")
            directory.mkdir()
            peer = start(recipe, directory, upstream.port, places) if recipe else start_ours(directory, upstream)
            if peer is None:
                print(f"{recipe.name if recipe else ''} is not installed", file=sys.stderr)
                continue
            try:
                # A case that is not held is given a second try: the upstream closes between cases, which a proxy with
                # a pool of connections may notice late.
                failed[peer.name] = [case for case in cases if not any(holds(peer, upstream, case) for _ in range(2))]
            finally:
                peer.stop()
            peers.append(peer)
    upstream.stop()
    rows = [["part", "cases", *(f"{peer.name} {peer.version}" for peer in peers)]]
    for part in [*parts, "all"]:
        counted = [case for case in cases if part in (case.part, "all")]
        held = [str(sum(case not in failed[peer.name] for case in counted)) for peer in peers]
        rows.append([part, str(len(counted)), *held])
    print(table(rows))
    for peer in peers:
        print(f"\nnot held by {peer.name}:", " ".join(case.id for case in failed[peer.name]) or "none")


if __name__ == "__main__":
    main(os.pathsep.join([*sys.argv[1:], os.environ.get("PATH", ""), "/usr/sbin"]))
