"""What a request is expected to use, and what of its key's limits it takes for that. Pure."""

from functools import lru_cache
from typing import Final, Literal

from attrs import define

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.values import MAX_AMOUNT, Kind, Rule

#: Output tokens of an answer whose request sets no bound.
DEFAULT_OUTPUT: Final = 1024
#: Bytes of a body for each token of a prompt where nobody reads it, and the most that is guessed so: what is longer is
#: likely to be an image or a sound.
_BYTES_PER_TOKEN: Final = 4
_MOST_PROMPT: Final = 8192

#: What is done with tokens for a request: they are read and made; only read; or neither, though it is asked as if so.
Work = Literal["writes", "reads", "counts"]

#: Last segments of the routes that read tokens and make none.
_READING: Final = frozenset({"embeddings", "embed", "pooling", "classify", "score", "rerank", "generative_scoring"})
#: … and of those that do neither.
_COUNTING: Final = frozenset({"tokenize", "detokenize", "count_tokens", "render", "derender"})


@define(kw_only=True)  # not frozen, which takes three times as long to make: there is one for each request
class Demand:
    """What one request is expected to use.

    :ivar asked: the model as the client named it, ``None`` where it named none.
    :ivar model: what vLLM calls it.
    :ivar is_bounded: how many output tokens there are at most is known: the client said it, or the route makes none.
    :ivar interval: tokens that one event of a stream may hold.
    :ivar is_detached: what is begun goes on when its client has left.
    :ivar spend: what the tokens cost, in micro-units of money; 0 where there are no prices.
    """

    asked: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_bounded: bool = False
    interval: int = 1
    is_detached: bool = False
    spend: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What a limit for its model may call that."""
        return tuple(dict.fromkeys([name for name in (self.asked, self.model) if name is not None]))


NO_DEMAND: Final = Demand()


def work_of(route: str) -> Work:
    """Return what vLLM does with tokens on a route (a decoded path)."""
    last = route.rstrip("/").rpartition("/")[2]
    return "counts" if last in _COUNTING else "reads" if last in _READING else "writes"


def expected_tokens(work: Work, prompt: int, output_bound: int | None) -> tuple[int, int]:
    """Return how many tokens a request is expected to read and to make.

    :param prompt: how many its prompt seems to have.
    :param output_bound: what the client said that it wants at most, in all answers together.
    """
    if work == "counts":
        return 0, 0
    prompt = min(prompt, MAX_AMOUNT)
    if work == "reads":
        return prompt, 0
    return prompt, DEFAULT_OUTPUT if output_bound is None else min(output_bound, MAX_AMOUNT)


def guessed_prompt(work: Work, body_bytes: int) -> int:
    """Return how many tokens the prompt may have in a body that nobody reads."""
    return expected_tokens(work, min(-(-body_bytes // _BYTES_PER_TOKEN), _MOST_PROMPT), None)[0]


def rules_of(key: VirtualKey, demand: Demand, now: float) -> tuple[Rule, ...]:
    """Return what ``demand`` takes of each of the key's limits at ``now`` (epoch seconds)."""
    rules = []
    tokens = demand.prompt_tokens + demand.output_tokens
    if key.rpm_limit is not None:
        rules.append(_rule_of("requests", "", key.rpm_limit, 1))
    if key.tpm_limit is not None:
        rules.append(_rule("tokens", "", key.tpm_limit, demand, tokens))
    for name in demand.names if key.model_rpm_limit or key.model_tpm_limit else ():
        rpm, tpm = key.model_rpm_limit.get(name), key.model_tpm_limit.get(name)
        if rpm is not None:
            rules.append(_rule_of("requests", name, rpm, 1))
        if tpm is not None:
            rules.append(_rule("tokens", name, tpm, demand, tokens))
    if key.max_parallel_requests is not None:
        rules.append(_rule_of("max_parallel_requests", "", key.max_parallel_requests, 1))
    budget = key.budget
    if not budget.is_limited:
        return tuple(rules)
    period, _ = budget.period(now)
    if budget.is_priced:
        limit = MAX_AMOUNT if budget.money is None else budget.money
        rules.append(_rule("budget", "", limit, demand, demand.spend, period=period))
    if budget.tokens is not None:
        rules.append(_rule("budget_tokens", "", budget.tokens, demand, tokens, period=period))
    return tuple(rules)


def _rule(kind: Kind, scope: str, limit: int, demand: Demand, expected: int, *, period: int = 0) -> Rule:
    """Return the rule for what is expected. Where that is a guess of ours, whatever is left will do, if anything is."""
    cost = min(expected, MAX_AMOUNT)
    return _rule_of(kind, scope, limit, cost, period, None if demand.is_bounded else min(cost, 1))


#: Makes a rule, or returns the one that is the same: those of most requests are.
_rule_of = lru_cache(maxsize=4096)(Rule)
