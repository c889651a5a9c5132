"""What a batch of events adds up to, against adding them one by one."""

from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.limits.values import MAX_AMOUNT
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import NOTHING, batch_of
from vllmproxy.usage.sums import NO_ACCOUNT

DAY = 86_400
amounts = st.one_of(st.integers(-5, 1000), st.sampled_from([MAX_AMOUNT - 1, MAX_AMOUNT, MAX_AMOUNT + 1, 2**60]))
events = st.builds(
    UsageEvent,
    time=st.sampled_from([0.0, DAY - 0.5, DAY, 1.5 * DAY, 20_000.25 * DAY]),
    key=st.sampled_from(["", "master", "k1", "k2"]),
    model=st.sampled_from(["", "m", "n"]),
    end_user=st.sampled_from(["", "u"]),
    requests=st.sampled_from([1, 1, 0]),
    prompt_tokens=amounts,
    completion_tokens=amounts,
    cached_tokens=amounts,
    audio_ms=amounts,
    spend=amounts,
    quality=st.sampled_from(["reported", "estimated", "unknown", "none"]),
    period=st.sampled_from([0, 100, 200]),
    held=amounts,
    held_tokens=amounts,
    held_on=st.sampled_from([0, 20_000, 20_001]),
)


def bounded(number: int) -> int:
    return min(max(number, 0), MAX_AMOUNT)


@given(st.lists(events, max_size=30))
def test_a_batch_is_what_its_events_are_one_by_one(some: list[UsageEvent]) -> None:
    batch = batch_of(some)
    sums: dict[tuple[str, ...], list[int]] = {}
    for event in some:
        if event.requests:
            row = sums.setdefault((event.day, event.key, event.model, event.end_user), [*NOTHING])
            row[0] += 1
            row[1] += event.quality == "estimated"
            row[2] += event.quality == "unknown"
            for place, name in enumerate(
                ("prompt_tokens", "completion_tokens", "cached_tokens", "audio_ms", "spend"), 3
            ):
                row[place] += bounded(getattr(event, name))
    assert {
        (day, key, *row): [*numbers] for (day, key), rows in batch.sums.items() for row, numbers in rows.items()
    } == sums

    accounts, holds = {}, {}
    for event in some:
        if event.key in ("", "master"):
            continue
        key, tokens = event.key, bounded(event.prompt_tokens) + bounded(event.completion_tokens)
        account = accounts.get(key, NO_ACCOUNT)
        if event.period > account.period or key not in accounts:
            accounts[key], holds[key] = type(account)(event.period, 0, 0), {}
            account = accounts[key]
        if event.period == account.period:
            accounts[key] = type(account)(account.period, account.spend + bounded(event.spend), account.tokens + tokens)
            money, of_tokens = holds[key].get(event.held_on, (0, 0))
            holds[key][event.held_on] = money + bounded(event.held), of_tokens + bounded(event.held_tokens)
    assert {key: charge.applied(NO_ACCOUNT) for key, charge in batch.charges.items()} == accounts
    for held in holds.values():
        for day in [day for day, amounts in held.items() if amounts == (0, 0)]:
            del held[day]
    assert {key: charge.held for key, charge in batch.charges.items()} == holds
