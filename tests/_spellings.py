"""Ways to write a path: some that two readers could read differently, and some that all mean an admin route."""

from itertools import combinations

#: One admin route of vLLM's at its root and one below a prefix of its inference routes.
ADMIN = ("/sleep", "/v1/load_lora_adapter")

#: What no path may hold, raw or encoded, in every position.
UNSAFE = [
    "/v1%2fmodels",
    "/v1%2Fmodels",
    "/%2f",
    "/v1/models%2F",
    "/v1%5cmodels",
    "/v1%5Cmodels",
    "/v1\\models",
    "/%00",
    "/v1/models%00",
    "/v1/models%00.json",
    "//",
    "//v1/models",
    "/v1//models",
    "/v1/models//",
    "/v1///models",
    "/;",
    "/v1/models;x=1",
    "/v1;a/models",
    "/v1/models;",
    "/.",
    "/./",
    "/..",
    "/../",
    "/./v1/models",
    "/v1/./models",
    "/v1/models/.",
    "/v1/models/..",
    "/v1/../v1/models",
    "/../vllm/v1/models",
    "/../key/info",
    "/%2e",
    "/%2E/v1/models",
    "/%2e%2e",
    "/%2e%2e/v1/models",
    "/%2E%2e/%2e%2E/key/list",
    "/.%2e/v1/models",
    "/%2e./v1/models",
    "/v1/%2e%2E/sleep",
    "/v1/models/%2e%2e",
    "/v1/models/.?x=1",
    "/v1/models/%2e%2e?x=1",
    "//v1/models?x=1",
    "/v1/x%2f..%2fsleep",
    "/v1/..%2fsleep",
    "/v1/..%5csleep",
    "/v1/..;/sleep",
]

_TAILS = ("%00", ";", ";x=1", "%0a", "%0d%0a", "%09", "%20", "%c2%a0", "/.", "/..", "/%2e", "%2f", "%", "/%2500")
_FRONTS = ("/v1", "/v2", "/inference", "/inference/v1", "/cohere", "/cohere/v2", "/v1/v1")


def spellings(path: str) -> list[str]:
    """Return ways to write ``path``, or what a careless reader takes for it."""
    letters = [at for at, character in enumerate(path) if character != "/"]
    ways = {
        path,
        path + "/",
        path + "?",
        path + "?a=1",
        path + "?/v1/models",
        path + "/?level=1",
        path + "#",
        path + "/x",
        path + "/%20",
        path + "//",
    }
    for at in letters:
        for code in ("%%%02x", "%%%02X"):
            ways.add(path[:at] + code % ord(path[at]) + path[at + 1 :])
        ways.add(path[:at] + path[at].upper() + path[at + 1 :])
        ways.add(path[:at] + f"%25{ord(path[at]):02x}" + path[at + 1 :])  # encoded twice
        ways |= {_encoded(path.upper(), {at}), path[:at] + path[at:].upper(), path[:at].upper() + path[at:]}
        ways.add("".join(c if at == other or c == "/" else f"%{ord(c):02x}" for other, c in enumerate(path)))
    for count in range(2, 6):
        ways |= {_encoded(path, set(some)) for some in combinations(letters[:5], count)}
    every = "".join(character if character == "/" else f"%{ord(character):02x}" for character in path)
    ways |= {every, every.upper().replace("%5F", "%5f"), every + "/", every + "?x", path.upper(), path.title()}
    ways |= {way + tail for way in (every, path.upper(), path.title()) for tail in _TAILS}
    ways |= {front + way for way in (every, path.upper(), path.title()) for front in _FRONTS}
    ways |= {path.replace("/", mark) for mark in ("//", "/./", "/x/../", "/%2e/", "%2f", "/%2f", "/;/", "\\", "%5c")}
    ways |= {path + tail for tail in _TAILS}
    ways |= {front + path for front in _FRONTS}
    ways |= {"/" + path, "/." + path, "/.." + path, "/v1/.." + path, "/v1/%2e%2e" + path, "/vllm/.." + path}
    ways |= {"/v1/models/../.." + path, "/health/.." + path, "/static/.." + path, "/models/..%2f.." + path}
    if path.startswith("/v1/"):
        bare = path.removeprefix("/v1")
        ways |= {bare, bare + "/", "/inference" + bare, "/%761" + bare, "/v%31" + bare, "/V1" + bare, "/v1/" + bare}
    # What does not begin with a slash would not be below /vllm: test_only_vllm_is_below_vllm.
    return sorted(way for way in ways if way.startswith("/"))


def _encoded(path: str, some: set[int]) -> str:
    """Return ``path`` with the characters at these places percent-encoded."""
    return "".join(f"%{ord(c):02x}" if at in some else c for at, c in enumerate(path))
