"""Is everybody else answered while thousands of slow clients hold on? Needs slowhttptest (Debian has it).

    python benchmarks/slow_clients.py --connections 4000 --seconds 60

slowhttptest sends heads (``-H``) and bodies (``-B``) in drops, and reads answers so (``-X``), each against a proxy of
its own with default settings. ``--only drops`` is our own, for more of them: bodies by one byte a second, from clients
that come again when they are cut off. Meanwhile ``/health/liveliness`` and a small POST through ``/vllm`` are asked
each 0.2 s on new connections. Printed are what became of these, and the most memory and descriptors that the proxy had.
"""

import argparse
import asyncio
import re
import sys

from _running import HERE, HOST, Probe, allow_many_files, descriptors_of, mib, proxy_before_upstream, rss_of

ATTACKS = {
    "-H": ["-H", "-i", "5", "-x", "24", "-t", "GET"],
    "-B": ["-B", "-i", "5", "-s", "8192", "-x", "10", "-f", "application/json"],
    "-X": ["-X", "-w", "512", "-y", "1024", "-n", "5", "-z", "32"],
}
DROPS = "drops"


def command(name: str, port: int, options: argparse.Namespace) -> list[str]:
    """Return what attacks that port."""
    connections, seconds = str(options.connections), str(options.seconds)
    if name == DROPS:
        return [sys.executable, str(HERE / "_drops.py"), str(port), connections, str(options.addresses), seconds]
    path = "models" if name == "-X" else "chat/completions"
    many = ["-c", connections, "-r", str(options.rate), "-l", seconds]
    return ["slowhttptest", *ATTACKS[name], *many, "-u", f"http://{HOST}:{port}/vllm/v1/{path}", "-p", "5"]


async def attack(name: str, options: argparse.Namespace) -> None:
    """Run one of them, and say how it went."""
    with proxy_before_upstream() as (proxy, port):
        before = rss_of(proxy.pid)
        attacker = await asyncio.create_subprocess_exec(
            *command(name, port, options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert attacker.stdout is not None
        probe = Probe(port)
        most = [0, 0]

        async def watch() -> None:
            while True:
                most[:] = max(most[0], rss_of(proxy.pid)), max(most[1], descriptors_of(proxy.pid))
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        output, _ = await asyncio.gather(attacker.stdout.read(), probe.run(options.seconds))
        watching.cancel()
        await attacker.wait()
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output.decode(errors="replace"))
        lines = [" ".join(line.split()) for line in plain.splitlines()]
        told = [
            line for line in lines if line.startswith(("connected:", "closed:", "error:", "service available:"))
        ] or lines
        print(f"{name}  {probe.report()}")
        print(f"    memory {mib(before)}, at most {mib(most[0])}; descriptors at most {most[1]}")
        print(f"    attackers, at the end: {', '.join(told[-4:])}", flush=True)


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=4000)
    parser.add_argument("--rate", type=int, default=500, help="new ones a second")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--addresses", type=int, default=1, help="that those of --only drops come from")
    parser.add_argument("--only", choices=[*ATTACKS, DROPS])
    options = parser.parse_args()
    allow_many_files()
    for name in [options.only] if options.only else ATTACKS:
        asyncio.run(attack(name, options))


if __name__ == "__main__":
    main()
