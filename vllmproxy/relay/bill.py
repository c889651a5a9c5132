"""What one request owes: reserved, written down, and settled once, whatever becomes of it."""

from typing import Final

from attrs import define
from twisted.logger import Logger

from vllmproxy.observers.record import Ended
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.passing import Passing
from vllmproxy.relay.quotas import Quotas, Reservation
from vllmproxy.usage.book import Entry
from vllmproxy.usage.bookkeeper import Bookkeeper
from vllmproxy.usage.event import MOST, Quality, UsageEvent
from vllmproxy.usage.prices import Prices
from vllmproxy.usage.tokens import Usage

#: Tokens of prompt and answer, those that were cached, milliseconds of audio, and where that comes from.
_Used = tuple[int, int, int, int, Quality]
_NOTHING: Final[_Used] = (0, 0, 0, 0, "none")

_log = Logger(namespace=__name__)


@define
class Outcome:
    """How a request went, as far as that decides what it costs.

    :ivar forwarded: vLLM was asked.
    :ivar status: of vLLM's answer, 0 if there was none.
    :ivar answer: its body, ``None`` if it had none of its own.
    """

    ended: Ended
    forwarded: bool
    status: int = 0
    answer: Passing | None = None


class Bill:
    """One request's.

    :param entry: where it stands in the journal; ``None`` for what is not counted.
    :param expected: what it stands there as.
    :param admission: of the request.
    """

    def __init__(
        self,
        quotas: Quotas,
        prices: Prices | None,
        reservation: Reservation | None,
        entry: Entry | None,
        expected: UsageEvent,
        *,
        admission: Admission,
    ) -> None:
        self._admission = admission
        self._quotas = quotas
        self._prices = prices
        self._reservation = reservation
        self._entry = entry
        self._expected = expected

    @property
    def lines(self) -> bytes:
        """Header lines for the answer."""
        return b"" if self._reservation is None else self._reservation.lines

    def settle(self, outcome: Outcome) -> None:
        """Give back what was reserved and not used, and write down what was."""
        try:
            event = self._event(outcome)
        except Exception:  # nothing is awaited here; a place and a budget must not stay taken for it
            _log.failure("What a request used cannot be counted; it counts as was expected")
            event = self._expected
        if self._reservation is not None:
            tokens = None if event.quality == "unknown" else event.prompt_tokens + event.completion_tokens
            counted = self._entry is not None
            self._quotas.settle(self._reservation, forwarded=outcome.forwarded, tokens=tokens, counted=counted)
        if self._entry is not None:
            self._entry.end(event)

    def _event(self, outcome: Outcome) -> UsageEvent:
        answer, expected = outcome.answer, self._expected
        model = expected.model if answer is None or answer.model is None else answer.model
        prompt, completion, cached, audio_ms, quality = self._used(outcome)
        was_forwarded = outcome.forwarded
        return UsageEvent(
            time=expected.time,
            key=expected.key,
            model=model,
            end_user=expected.end_user,
            requests=1 if was_forwarded else 0,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=cached,
            audio_ms=audio_ms,
            spend=0 if self._prices is None else self._cost(self._prices, model, prompt, completion, cached, audio_ms),
            quality=quality,
            period=expected.period,
            # Of what was never forwarded, the limiter gives back what it held.
            held=expected.held if was_forwarded else 0,
            held_tokens=expected.held_tokens if was_forwarded else 0,
            held_on=expected.held_on,
        )

    def _used(self, outcome: Outcome) -> _Used:
        if not outcome.forwarded or outcome.status >= 300:
            return _NOTHING
        if outcome.answer is None or outcome.answer.usage is None:
            return self._without_usage(outcome)
        usage = outcome.answer.usage
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        quality: Quality = "reported"
        if usage.source == "counted":
            prompt = self._guessed_prompt if prompt is None else prompt
            completion, quality = self._of_events(completion or 0), "estimated"
        elif prompt is None or completion is None:
            prompt, completion, quality = self._filled(usage)
        audio_ms = 0 if usage.audio_seconds is None else round(usage.audio_seconds * 1000)
        return prompt, completion, usage.cached_prompt_tokens or 0, audio_ms, quality

    @property
    def _guessed_prompt(self) -> int:
        return self._expected.prompt_tokens or self._admission.guessed_prompt

    def _filled(self, usage: Usage) -> tuple[int, int, Quality]:
        """Return the tokens of a usage that does not tell those of the prompt or those of the answer: what is left of
        the total, else what was expected. What counts audio tells neither, and of a prompt that is only read, none are
        made."""
        prompt, completion, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
        if usage.audio_seconds is not None and total is None:
            return prompt or 0, completion or 0, "reported"
        if completion is None and self._admission.way.work != "writes":
            completion = 0
        quality: Quality = "reported"
        if prompt is None:
            if total is not None and completion is not None:
                prompt = max(total - completion, 0)
            else:
                prompt, quality = self._guessed_prompt, "estimated"
                prompt = prompt if total is None else min(prompt, total)
        if completion is None:
            if total is not None:
                completion = max(total - prompt, 0)
            else:
                completion, quality = self._expected.completion_tokens, "estimated"
        return prompt, completion, quality

    def _of_events(self, events: int) -> int:
        """Return how many tokens so many events hold, at most. Of what goes on without its client, all."""
        demand = self._admission.demand
        if demand.is_detached:
            return max(events, demand.output_tokens)
        tokens = events * demand.interval
        return max(events, min(tokens, demand.output_tokens)) if demand.is_bounded else tokens

    def _without_usage(self, outcome: Outcome) -> _Used:
        """Nothing was said. What was expected is charged: the answer was compressed, binary or cut off, or it is to be
        fetched later (``background`` responses). Of one that never began, and of a stream without an event, the
        prompt."""
        expected, admission, answer = self._expected, self._admission, outcome.answer
        has_begun = outcome.status > 0 and not (answer is not None and answer.counts_events)
        if expected.tokens:
            is_charged = has_begun or admission.demand.is_detached
            return expected.prompt_tokens, expected.completion_tokens if is_charged else 0, 0, 0, "estimated"
        if not admission.tells_usage:
            return _NOTHING
        return (0, 0, 0, 0, "unknown") if has_begun else (admission.guessed_prompt, 0, 0, 0, "estimated")

    def _cost(self, prices: Prices, model: str, *counts: int) -> int:
        costs = (prices.cost(name, *counts) for name in (model, self._expected.model) if name)
        return min(next((cost for cost in costs if cost is not None), 0), MOST)


def open_bill(
    admission: Admission,
    reservation: Reservation | None,
    *,
    time: float,
    quotas: Quotas,
    prices: Prices | None,
    books: Bookkeeper,
) -> Bill:
    """Begin the bill of a request that is about to be forwarded. Raises
    :class:`~vllmproxy.usage.bookkeeper.CannotWriteDown`."""
    demand, caller = admission.demand, admission.caller
    expected = UsageEvent(
        time=time,
        key=caller.key_id or "",
        model=demand.model or "",
        end_user=admission.end_user or "",
        prompt_tokens=demand.prompt_tokens,
        completion_tokens=demand.output_tokens,
        spend=demand.spend,
        quality="estimated" if demand.prompt_tokens or demand.output_tokens else "unknown",
    )
    key = caller.key
    if reservation is not None and key is not None and key.budget.is_limited:
        expected.period = reservation.period or 0
        expected.held = reservation.held("budget")
        expected.held_tokens = reservation.held("budget_tokens")
        expected.held_on = reservation.day
    elif key is not None:
        expected.period = key.budget.period(time)[0]
    entry = books.begin(expected) if admission.uses_tokens else None
    return Bill(quotas, prices, reservation, entry, expected, admission=admission)
