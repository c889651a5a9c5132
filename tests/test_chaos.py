"""Upstreams that die anywhere in an answer, and bodies cut into pieces of any size: all drawn by lot.

A failure says its seed; ``CHAOS_SEED=seed`` draws the same again.
"""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
from _asking import make_key
from _raw import AUTH, CHUNKED, LAST_CHUNK, OK, PATIENCE, MiB, Upstream, Wire, chunk, connect, request
from _service import Twistd
from _witness import answers_in, converse
from attrs import frozen

GET = request(b"GET", b"/vllm/v1/models")
BODIES = {False: b'{"model":"m","messages":[]}', True: b'{"model":"m","messages":[],"stream":true}'}
EVENT = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word %d"}}]}\n\n'
POOL = random.Random(0).randbytes(MiB)


def chaos_seed() -> int:
    """Return the seed that is asked for, or a new one."""
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(2**32))


@frozen
class Death:
    """How an upstream dies in the middle of an answer.

    :ivar pieces: what it sends before, one write each.
    :ivar in_head: the answer's head is not whole.
    :ivar reused: on a connection that has answered a request before.
    :ivar counted: asked for with a virtual key whose tokens the proxy counts.
    """

    kind: str
    pieces: tuple[bytes, ...]
    in_head: bool
    end: str
    reused: bool
    counted: bool


def draw_answer(lot: random.Random, kind: str) -> bytes:
    """Return a whole answer: with a length, chunked, or a stream of events."""
    if kind == "events":
        events = [chunk(EVENT % number) for number in range(lot.randint(1, 40))]
        return CHUNKED + b"".join([*events, chunk(b"data: [DONE]\n\n"), LAST_CHUNK])
    data = lot.randbytes(int(2 ** lot.uniform(0, 18)))
    if kind == "length":
        return b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)
    pieces = b"".join(chunk(data[start:stop]) for start, stop in cuts(lot, len(data)))
    return b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ntransfer-encoding: chunked\r\n\r\n" + pieces + LAST_CHUNK


def cuts(lot: random.Random, size: int, largest: int = 18) -> Iterator[tuple[int, int]]:
    """Cut ``size`` bytes into pieces of 1 to 2 ** ``largest`` bytes, small ones as likely as large ones."""
    start = 0
    while start < size:
        stop = min(size, start + int(2 ** lot.uniform(0, largest)))
        yield start, stop
        start = stop


def draw_death(lot: random.Random, number: int) -> Death:
    kind = ("length", "chunked", "events")[number % 3]
    answer = draw_answer(lot, kind)
    head = answer.index(b"\r\n\r\n") + 4
    part = lot.random()  # a third each: in the head, within 10 bytes of the end, anywhere
    if part < 1 / 3:
        offset = lot.randrange(head)
    else:
        offset = lot.randrange(max(len(answer) - 10, head) if part > 2 / 3 else head, len(answer))
    pieces = tuple(answer[start:stop] for start, stop in cuts(lot, offset))
    end, reused, counted = lot.choice(["fin", "reset"]), lot.random() < 0.5, kind == "events" and lot.random() < 0.5
    return Death(kind, pieces, offset < head, end, reused, counted)


def die(deaths: list[Death], asked: Counter[int], wire: Wire) -> None:
    """A script: answer well what has no number, and die in the answer to what has one."""
    while not (number := wire.message().get(b"x-number")):
        wire.send(OK)
    asked[int(number)] += 1
    death = deaths[int(number)]
    for piece in death.pieces:
        wire.send(piece)
    wire.close() if death.end == "fin" else wire.reset()


def judge(proxy: Twistd, death: Death, number: int, key: bytes) -> str:
    """Ask, and return what was seen: ``502``, ``cut``, or what should not be."""
    body = BODIES[death.kind == "events"]
    asked = request(b"POST", b"/vllm/v1/chat/completions", b"X-Number: %d" % number, body=body, key=key)
    with connect(proxy) as client:
        if death.reused:
            client.send(GET)
            assert client.message().status == 200
        seen, how = converse(client.sock, asked, lambda heard: bool(answers_in(heard)[0]), PATIENCE)
    whole, _ = answers_in(seen)
    if whole:
        return str(whole[0].status)
    if how == "late":
        return "open"
    return "cut" if seen.startswith(b"HTTP/1.1 200 ") else f"ended by {how} after {seen[:80]!r}"


def kill_at_random_offsets(upstream: Upstream, proxy: Twistd, count: int) -> None:
    seed = chaos_seed()
    lot = random.Random(seed)
    deaths = [draw_death(lot, number) for number in range(count)]
    asked: Counter[int] = Counter()
    seen: Counter[str] = Counter()
    counted = b"Authorization: Bearer " + make_key(proxy, tpm_limit=10**9)["key"].encode()
    with upstream.playing(partial(die, deaths, asked)):
        for number, death in enumerate(deaths):
            verdict = judge(proxy, death, number, counted if death.counted else AUTH)
            what = f"CHAOS_SEED={seed}, number {number}: {verdict}, {death.kind}, {sum(map(len, death.pieces))} bytes"
            assert verdict == "502" or (verdict == "cut" and not death.in_head), f"{what}, {death}"
            seen[verdict] += 1
    print(f"CHAOS_SEED={seed}: {count} deaths, {sum(death.in_head for death in deaths)} in the head, {dict(seen)}")
    assert asked == dict.fromkeys(range(count), 1), f"CHAOS_SEED={seed}: asked for more than once, or never"


def test_an_upstream_that_dies_anywhere_never_makes_a_whole_answer(upstream: Upstream, scripted_proxy: Twistd) -> None:
    """A 502 where the head was not whole, else that or an answer that breaks off; and it is asked only once."""
    kill_at_random_offsets(upstream, scripted_proxy, 60)


@pytest.mark.slow
def test_a_thousand_upstreams_that_die_anywhere(upstream: Upstream, scripted_proxy: Twistd) -> None:
    kill_at_random_offsets(upstream, scripted_proxy, 1000)


def send_in_pieces(lot: random.Random, wire: Wire, size: int, chunked: bool) -> str:
    """Send a body, its chunks and the writes cut at random and each for itself; return its SHA-256."""
    digest, held = hashlib.sha256(), bytearray()
    write = 1
    for start, stop in cuts(lot, size):
        at = lot.randrange(len(POOL) - (stop - start))
        data = POOL[at : at + stop - start]
        digest.update(data)
        held += chunk(data) if chunked else data
        while len(held) >= write:
            wire.send(bytes(held[:write]))
            del held[:write]
            write = int(2 ** lot.uniform(0, 18))
    wire.send(bytes(held) + (LAST_CHUNK if chunked else b""))
    return digest.hexdigest()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_body_in_any_pieces_arrives_as_it_was_sent(
    upstream: Upstream, scripted_proxy: Twistd, way: str, chunked: bool
) -> None:
    size, seed = 16 * MiB, chaos_seed()
    lot = random.Random(seed)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
    sent: list[str] = []
    got: list[str] = []

    def script(wire: Wire) -> None:
        if way == "up":
            got.append(hashlib.sha256(wire.message().body).hexdigest())
            wire.send(OK)
        else:
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % framing)
            sent.append(send_in_pieces(lot, wire, size, chunked))

    with upstream.playing(script), connect(scripted_proxy) as client:
        if way == "up":
            client.send(request(b"POST", b"/vllm/v1/audio/transcriptions", framing))
            sent.append(send_in_pieces(lot, client, size, chunked))
            assert client.message().body == b"ok"
        else:
            client.send(GET)
            got.append(hashlib.sha256(client.message().body).hexdigest())
    assert got == sent, f"CHAOS_SEED={seed}"
