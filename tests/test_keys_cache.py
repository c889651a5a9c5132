from twisted.internet.task import Clock

from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.key import VirtualKey


def key(token: str) -> VirtualKey:
    return VirtualKey(token=token, key_name="sk-...aaaa")


def test_a_key_is_believed_for_its_time() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=1.0)
    assert cache.get("a") is None
    cache.put("a", key("a"))
    clock.advance(0.999)
    assert cache.get("a") == key("a")
    clock.advance(0.001)
    assert cache.get("a") is None
    assert len(cache) == 0


def test_a_stranger_is_remembered_for_its_time() -> None:
    clock = Clock()
    cache = KeyCache(clock, ttl=60, negative_ttl=2.0)
    assert not cache.is_unknown("a")
    cache.put("a", None)
    clock.advance(1.9)
    assert cache.is_unknown("a")
    assert cache.get("a") is None
    clock.advance(0.1)
    assert not cache.is_unknown("a")
    assert len(cache) == 0


def test_one_answer_replaces_the_other() -> None:
    cache = KeyCache(Clock())
    cache.put("a", None)
    cache.put("a", key("a"))
    assert not cache.is_unknown("a")
    cache.put("a", None)
    assert cache.get("a") is None


def test_forget_drops_both_kinds() -> None:
    cache = KeyCache(Clock())
    cache.put("a", key("a"))
    cache.put("b", None)
    cache.forget("a")
    cache.forget("b")
    cache.forget("c")
    assert cache.get("a") is None
    assert not cache.is_unknown("b")


def test_the_least_recently_used_goes_first() -> None:
    cache = KeyCache(Clock(), max_entries=2)
    cache.put("a", key("a"))
    cache.put("b", key("b"))
    assert cache.get("a") is not None
    cache.put("c", key("c"))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None


def test_made_up_keys_are_bounded_and_push_no_real_one_out() -> None:
    cache = KeyCache(Clock(), max_entries=10, max_unknown=5)
    cache.put("a", key("a"))
    for number in range(1000):
        cache.put(f"made-up-{number}", None)
    assert cache.get("a") is not None
    assert len(cache) == 6
    assert cache.is_unknown("made-up-999")
    assert not cache.is_unknown("made-up-994")
