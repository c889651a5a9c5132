"""Try mutations of the corpus on the wire for some time, with h11 as the oracle: ``python tests/fuzz_wire.py 300``.

Prints the seed first and the counts last. Stops at the first input that breaks a rule, with the input.
"""

import random
import sys
import time

from _fuzz import ANSWER_TOKENS, ANSWERS, REQUEST_TOKENS, REQUESTS, check_answer, check_request, cuts_in, mutated


def main(seconds: float, seed: int) -> None:
    """Fuzz both directions by turns."""
    print(f"seed {seed}", flush=True)
    source, end = random.Random(seed), time.monotonic() + seconds
    tried = {"requests": 0, "answers": 0}
    whole = dict(tried)
    while time.monotonic() < end:
        data = mutated(source, REQUESTS, REQUEST_TOKENS)
        tried["requests"] += 1
        whole["requests"] += check_request(data, cuts_in(source, data)) > 0
        data = mutated(source, ANSWERS, ANSWER_TOKENS)
        method, how = source.choice([b"GET", b"GET", b"HEAD", b"POST"]), source.choice(["fin", "reset"])
        tried["answers"] += 1
        whole["answers"] += check_answer(data, cuts_in(source, data), method, how)
    for what, count in tried.items():
        print(f"{what}: {count:,} inputs tried, {whole[what]:,} of them passed as whole, as h11 saw them")


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("60", str(random.SystemRandom().getrandbits(32)))[len(sys.argv) - 1 :]]
    main(float(arguments[0]), int(arguments[1]))
