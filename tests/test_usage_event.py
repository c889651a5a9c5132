"""A usage event as JSON: written by hand, it says what json.dumps would."""

import json
from typing import get_args

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.usage.event import Quality, UsageEvent

TEXTS = st.text(st.characters(exclude_categories=()), max_size=5)
VALUES = {
    "time": st.one_of(st.integers(0, 10**10), st.floats(0, 1e10)),
    "quality": st.sampled_from(get_args(Quality)),
    **dict.fromkeys(("key", "model", "end_user"), TEXTS),
}
EVENTS = st.builds(
    UsageEvent, **{field.name: VALUES.get(field.name, st.integers(0, 1 << 53)) for field in attrs.fields(UsageEvent)}
)


@given(EVENTS)
@example(UsageEvent(time=86_400, key="k", held=1))
def test_what_is_not_as_by_default_is_written_and_read_again(event: UsageEvent) -> None:
    defaults = {field.name: field.default for field in attrs.fields(UsageEvent)}
    told = {"held_on"} if event.held or event.held_tokens else set()  # or it would be the day of the time
    said = {name: value for name, value in attrs.asdict(event).items() if value != defaults[name] or name in told}
    time, _, rest = event.as_json().partition(",")
    assert rest == json.dumps(said, separators=(",", ":")).partition(",")[2]
    said["time"] = json.loads(time.removeprefix('{"time":'))
    assert said["time"] == pytest.approx(event.time, rel=1e-15, abs=6e-7)
    # json pairs up surrogates that were written one by one
    read = UsageEvent.of_json(json.loads(event.as_json()))
    assert attrs.asdict(read) == {**defaults, **json.loads(json.dumps(said))}
    assert UsageEvent.of_json(json.loads(read.as_json())).as_json() == read.as_json()


def test_what_another_version_wrote_is_read_as_far_as_it_goes() -> None:
    fields = {"time": 3.5 * 86_400, "key": "k", "held": 7}
    older, newer = UsageEvent.of_json(fields), UsageEvent.of_json({**fields, "held_on": 5, "colour": "green"})
    assert (older.held_on, newer.held_on) == (3, 5)
    assert UsageEvent.of_json({"time": 3.5 * 86_400, "key": "k"}).held_on == 0


def test_an_event_with_nothing_but_what_it_must_have() -> None:
    assert UsageEvent(time=1.5, key="k").as_json() == '{"time":1.500000,"key":"k"}'
