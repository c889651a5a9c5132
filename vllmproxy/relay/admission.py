"""What a request has to pass before it is forwarded: who calls, where to, for which model, and for how much."""

from typing import TYPE_CHECKING

from vllmproxy.errors import BadRequest, Forbidden, ModelDenied, StoreDown, TooLarge
from vllmproxy.http1.bodies import Piece
from vllmproxy.http1.stream import Stream
from vllmproxy.inspection.request import Asked
from vllmproxy.inspection.splice import edited, model_edits, moved, usage_edits
from vllmproxy.keys.gate import ANONYMOUS, Caller
from vllmproxy.keys.key import VirtualKey
from vllmproxy.relay.demand import NO_DEMAND, Demand, expected_tokens, guessed_prompt
from vllmproxy.relay.facts import Facts, Terms
from vllmproxy.relay.holding import HeldBody

if TYPE_CHECKING:
    from vllmproxy.relay.relay import Relay

_NO_TUNNEL = (
    "This key is for certain models, or has a limit of tokens or a budget. What passes in a WebSocket is not read, so "
    "that could not be kept: use a key without them."
)


class Admission:
    """What is known of one request while it is being judged.

    :ivar facts: what its head tells; ``way``: where it is going.
    :ivar end_user: what it names as its own user, if anything.
    :ivar body: all of the request's body, in pieces, as it is forwarded, where that had to be read; else ``None``.
    :ivar demand: what it is expected to use.
    :ivar withholds: the answer has one event that the client did not ask for.
    """

    def __init__(self, relay: "Relay", stream: Stream, facts: Facts) -> None:
        self._relay = relay
        self._stream = stream
        self.facts = facts
        self.way = facts.way
        self.caller = ANONYMOUS
        self.end_user = facts.end_user
        self.body: list[Piece] | None = None
        self.demand: Demand = NO_DEMAND
        self.withholds = False
        self._first = b""
        self._more: HeldBody | None = None
        self._held = 0

    @property
    def uses_tokens(self) -> bool:
        """Whether vLLM may read or make tokens for it; a route that is not known may."""
        return self.way.group == "inference" if self._stream.head.websocket else self.way.uses_tokens

    @property
    def guessed_prompt(self) -> int:
        """Tokens that the prompt may have, by the length of a body that nobody reads."""
        stream = self._stream
        return guessed_prompt(self.way.work, stream.head.content_length or stream.bytes_in)

    @property
    def tells_usage(self) -> bool:
        """Whether an answer without any usage has left something out."""
        return self.uses_tokens if self._stream.head.websocket else self.way.tells_usage

    def check(self, caller: Caller) -> bool:
        """Tell whether the body has to be read first. Raises :class:`~vllmproxy.errors.ApiError`: it does not pass."""
        self.caller = caller
        facts, key, head = self.facts, caller.key, self._stream.head
        if key is None or facts.opened_by is not key:
            self._relay.gate.check_route(caller, self.way.group, self.way.path, facts.server.upstream.base_path)
            facts.opened_by = key
        if key is None:
            return False
        if head.websocket:
            if key.needs_model or key.counts_tokens:
                raise Forbidden(_NO_TUNNEL)
            return False
        tells_more = self._relay.usage == "exact" and self.way.streams_usage
        return self.way.uses_tokens and (key.needs_body or tells_more)

    def expect(self) -> None:
        """The body is to be held as it comes. Raises as :meth:`hold` does, if it says that it is too large."""
        length = self._stream.head.content_length
        if length is not None:
            self._check_size(length)

    def hold(self, data: bytes) -> None:
        """Keep a piece of the body. Raises :class:`TooLarge`, :class:`StoreDown`."""
        self._check_size(self._held + len(data))
        if not self._held:  # nearly always, that is all
            self._first = data
        elif self._more is None:
            self._more = HeldBody(self._first + data, self._stream.head.content_length)
            self._first = b""
        else:
            self._more.add(data)
        self._held += len(data)
        self._relay.hold(self.caller.key_id, len(data))

    def _check_size(self, size: int) -> None:
        relay = self._relay
        if size > relay.max_inspected_body:
            raise TooLarge(
                f"This key's rules need the body read before it is forwarded, and at most {relay.max_inspected_body} "
                "bytes of it are held for that (--max-inspected-body)."
            )
        if not relay.may_hold(self.caller.key_id, size - self._held):
            raise StoreDown("Too many bodies are being read just now. Try again in a moment.")

    def judge(self) -> None:
        """Read the body that was held: is its model open, and what is it going to use? Changes the few bytes of it that
        an alias or ``--usage exact`` change. Raises :class:`~vllmproxy.errors.ApiError`."""
        key = self.caller.key
        assert key is not None
        body = self._first if self._more is None else self._more.whole
        self._first, self._more = b"", None
        asked, prompt_tokens, longer = self.facts.bodies.read(body)
        terms = self.facts.terms
        if terms is None or terms.asked is not asked or terms.key is not key or terms.usage != self._relay.usage:
            terms = self._terms(key, asked)
            self.facts.terms = terms if asked.size else None  # no other body has the same
        model, edits = terms.model, terms.edits
        self.withholds = terms.withholds
        self.end_user = self.end_user or asked.end_user
        self.body = edited(body, moved(edits, asked, longer)) if edits else [body]
        prompt, output = expected_tokens(self.way.work, prompt_tokens, asked.output_tokens)
        self.demand = Demand(
            asked=asked.model,
            model=model,
            prompt_tokens=prompt,
            output_tokens=output,
            is_bounded=self.way.work != "writes" or asked.output_tokens is not None,
            interval=asked.interval,
            is_detached=asked.detached,
            spend=self._price(key, model, prompt, output),
        )

    def _terms(self, key: VirtualKey, asked: Asked) -> Terms:
        """Return what is to be done with such a body. Raises :class:`~vllmproxy.errors.ApiError`: it does not pass."""
        usage = self._relay.usage
        if key.counts_tokens and asked.unclear:
            raise BadRequest(
                f"This key has a limit of tokens or a budget, and {asked.unclear}: what it uses could not be counted. "
                "Send plain UTF-8 JSON, each member once."
            )
        model = self._model_for(key, asked)
        edits = [] if model is None or model == asked.model else model_edits(asked, model)
        told = []
        if usage == "exact" or (usage == "auto" and key.counts_tokens):
            told = usage_edits(self.way.route, asked)
        return Terms(asked, key, usage, model, edits + told, withholds=bool(told))

    def _model_for(self, key: VirtualKey, asked: Asked) -> str | None:
        """Return what vLLM calls the model. Raises where the key may not use it, or nobody can say which it is."""
        if asked.surety != "named":
            if key.needs_model and asked.surety == "ambiguous":
                raise BadRequest(
                    f"This key is for certain models, and {asked.reason}: it could be read as another one. Send plain "
                    "UTF-8 JSON with one model, a string.",
                    param="model",
                )
            if key.needs_model:
                raise ModelDenied("This key is for certain models: say which one in the body's model.")
            return None
        assert asked.model is not None
        if not key.model_rules.allows(asked.model):
            names = ", ".join(key.models)
            raise ModelDenied(f"This key is not allowed to use the model {asked.model[:64]!r}. It may use: {names}.")
        return key.model_rules.resolve(asked.model)

    def _price(self, key: VirtualKey, model: str | None, prompt: int, output: int) -> int:
        prices = self._relay.prices
        cost = None if prices is None or model is None else prices.cost(model, prompt, output, 0, 0)
        if cost is None and key.budget.is_priced:
            raise Forbidden(
                f"This key has a budget, and the model {(model or '')[:64]!r} has no price, so that it cannot be kept. "
                "Whoever runs this proxy can give it one (--prices)."
            )
        return cost or 0

    def release(self) -> None:
        """The body is held no longer."""
        if self._held:
            self._relay.hold(self.caller.key_id, -self._held)
            self._held = 0
        self._first, self._more = b"", None
