"""What one request owes: reserved, written down, and settled once, whatever becomes of it."""

from attrs import evolve, frozen

from vllmproxy.keys.key import VirtualKey
from vllmproxy.observers.record import Ended
from vllmproxy.relay.admission import Admission
from vllmproxy.relay.passing import Passing
from vllmproxy.relay.quotas import Quotas, Reservation
from vllmproxy.usage.bookkeeper import Bookkeeper, Entry
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.prices import Prices
from vllmproxy.usage.tokens import Usage


@frozen
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
        self._demand = admission.demand
        self._prompt = admission.guessed_prompt
        self._tells_usage = admission.tells_usage
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
        event = self._event(outcome)
        if self._reservation is not None:
            tokens = None if event.quality == "unknown" else event.tokens
            self._quotas.settle(self._reservation, forwarded=outcome.forwarded, tokens=tokens)
        if self._entry is not None:
            self._entry.end(event)

    def _event(self, outcome: Outcome) -> UsageEvent:
        answer, expected = outcome.answer, self._expected
        model = expected.model if answer is None or answer.model is None else answer.model
        event = evolve(expected, prompt_tokens=0, completion_tokens=0, spend=0, quality="none", model=model)
        if not outcome.forwarded:
            return evolve(event, requests=0, held=0, held_tokens=0)  # the limiter gives back what it held
        if outcome.status >= 400:
            return event
        if answer is not None and answer.usage is not None:
            return self._priced(self._of_usage(event, answer.usage))
        return self._without_usage(event, outcome)

    def _of_usage(self, event: UsageEvent, usage: Usage) -> UsageEvent:
        prompt, completion = usage.prompt_tokens, usage.completion_tokens or 0
        if usage.source == "counted":
            if prompt is None:
                prompt = self._expected.prompt_tokens or self._prompt
            completion = self._of_events(completion)
        return evolve(
            event,
            prompt_tokens=prompt or 0,
            completion_tokens=completion,
            cached_tokens=usage.cached_prompt_tokens or 0,
            audio_ms=round((usage.audio_seconds or 0) * 1000),
            quality="reported" if usage.source == "reported" else "estimated",
        )

    def _of_events(self, events: int) -> int:
        """Return how many tokens so many events hold, at most. Of what goes on without its client, all."""
        demand = self._demand
        if demand.is_detached:
            return max(events, demand.output_tokens)
        tokens = events * demand.interval
        return max(events, min(tokens, demand.output_tokens)) if demand.is_bounded else tokens

    def _without_usage(self, event: UsageEvent, outcome: Outcome) -> UsageEvent:
        """Nothing was said. What was expected is charged: the answer was compressed, binary or cut off, or it is to be
        fetched later (``background`` responses). Of one that never began, the prompt."""
        expected = self._expected
        if not expected.tokens:
            return evolve(event, quality="unknown") if self._tells_usage else event
        output = expected.completion_tokens if outcome.status or self._demand.is_detached else 0
        return self._priced(
            evolve(event, prompt_tokens=expected.prompt_tokens, completion_tokens=output, quality="estimated")
        )

    def _priced(self, event: UsageEvent) -> UsageEvent:
        if self._prices is None:
            return event
        counts = (event.prompt_tokens, event.completion_tokens, event.cached_tokens, event.audio_ms)
        costs = (self._prices.cost(model, *counts) for model in (event.model, self._expected.model) if model)
        return evolve(event, spend=next((cost for cost in costs if cost is not None), 0))


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
    demand, key = admission.demand, admission.caller.key
    expected = UsageEvent(
        time=time,
        key=admission.caller.key_id or "",
        model=demand.model or "",
        end_user=admission.end_user or "",
        prompt_tokens=demand.prompt_tokens,
        completion_tokens=demand.output_tokens,
        spend=demand.spend,
        quality="estimated" if demand.tokens else "unknown",
        period=_period(key, reservation, time),
        held=0 if reservation is None else reservation.held("budget"),
        held_tokens=0 if reservation is None else reservation.held("budget_tokens"),
    )
    entry = books.begin(expected) if admission.uses_tokens else None
    return Bill(quotas, prices, reservation, entry, expected, admission=admission)


def _period(key: VirtualKey | None, reservation: Reservation | None, time: float) -> int:
    """Return the period that the key's account is charged in: the one that was asked about, if any was."""
    if reservation is not None and reservation.period is not None:
        return reservation.period
    return 0 if key is None else key.budget.period(time)[0]
