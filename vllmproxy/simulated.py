"""``--simulate``: a simulated vLLM beside the proxy, a master key in a file, and what to try."""

import os
import secrets
import shlex
import socket
from pathlib import Path
from typing import Any

from attrs import evolve
from twisted.internet.interfaces import IListeningPort

from vllmproxy.certificates import split_endpoint
from vllmproxy.settings import Secret, Settings, checked_secret
from vllmproxy.simulator.config import DEFAULT_MODEL, SimulatorConfig
from vllmproxy.simulator.server import SimulatorFactory
from vllmproxy.upstreams.upstream import Upstream

#: Seconds between two tokens: slow enough to be seen streaming.
TOKEN_INTERVAL = 0.05
#: The longest answer, so that an example with ``max_tokens`` 2048 ends while somebody watches.
ANSWER_TOKENS = 40


def start_simulator(reactor: Any, settings: Settings) -> tuple[IListeningPort, Settings]:
    """Start the simulator on a free port of loopback; return its port and the settings that point there.

    A master key is made if none was given, and left in ``master-key`` in the state directory, mode 0600: a later
    start finds it there.
    """
    factory = SimulatorFactory(reactor, SimulatorConfig(tpot=TOKEN_INTERVAL, answer_tokens=ANSWER_TOKENS))
    port: IListeningPort = reactor.listenTCP(0, factory, interface="127.0.0.1")
    upstream = Upstream.parse(f"http://127.0.0.1:{port.getHost().port}")  # type: ignore[attr-defined]
    key = settings.master_key or Secret(_kept_key(settings.kept_master_key))
    return port, evolve(settings, upstream=upstream, master_key=key)


def _kept_key(path: Path) -> str:
    if path.exists():
        return checked_secret(path.read_text(), str(path)).reveal()
    key = "sk-" + secrets.token_urlsafe(24)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    return key


def what_to_try(base: str, key: Path | None) -> str:
    """Return curl lines for a person; the key itself is not in them.

    :param base: ``http://host:port`` of the proxy.
    :param key: the file that a master key was made in; ``None``: the person has one.
    """
    secret = "$LITELLM_MASTER_KEY" if key is None else f"$(cat {shlex.quote(str(key))})"
    auth = f'-H "Authorization: Bearer {secret}"'
    terminal = "in another terminal" if key else "in another terminal, with your master key in LITELLM_MASTER_KEY"
    json = "-H 'Content-Type: application/json'"
    chat = (
        f'{{"model": "{DEFAULT_MODEL}", "messages": [{{"role": "user", "content": "What is there to see in Paris?"}}]'
    )
    return f"""
vllmproxy answers on {base}, with a simulated vLLM behind it. Try, {terminal}:

  curl {base}/vllm/metrics {auth}

  curl {base}/vllm/v1/chat/completions {auth} \\
    {json} -d '{chat}}}'

  # streamed:
  curl -N {base}/vllm/v1/chat/completions {auth} \\
    {json} -d '{chat}, "stream": true}}'

  # for the README's own examples:
  export LITELLM_MASTER_KEY="{secret}" LITELLM_VIRTUAL_KEY="{secret}"

  # a virtual key for somebody else:
  curl {base}/key/generate {auth} \\
    {json} -d '{{"key_alias": "alice", "duration": "30d"}}'

"""


def base_url(address: Any, description: str) -> str:
    """Return the URL of a listening address, for a person on this machine.

    :param description: the endpoint that it came of.
    """
    scheme = "http" if split_endpoint(description)[1] is None else "https"
    host = getattr(address, "host", None)
    if host is None:
        return f"unix:{os.fsdecode(address.name)}" if getattr(address, "name", None) else "a socket"
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"{scheme}://[{host}]:{address.port}" if ":" in host else f"{scheme}://{host}:{address.port}"
