"""What a change of a key does to what the master key stands behind."""

import pytest

from vllmproxy.api.patches import KeyPatch
from vllmproxy.keys.key import VirtualKey

PLANTED = VirtualKey(token="0" * 64, key_name="sk-...x", key_type="read_only", allowed_routes=("admin",))
GRANTED = VirtualKey(token="0" * 64, key_name="sk-...x", allowed_routes=("admin",), granted_by_master=True)
PLAIN = VirtualKey(token="0" * 64, key_name="sk-...x")


@pytest.mark.parametrize(
    ("key", "fields", "is_master", "granted"),
    [
        (PLANTED, {"key_type": "default"}, True, False),  # the routes are still somebody else's
        (PLANTED, {"allowed_routes": ("admin",)}, True, True),
        (PLAIN, {"key_type": "management"}, True, True),
        (GRANTED, {"key_type": "llm_api"}, True, True),
        (GRANTED, {"user_id": "u"}, False, True),
        (GRANTED, {"key_type": "default"}, False, False),
        (PLAIN, {"allowed_routes": ("admin",)}, False, False),
    ],
)
def test_the_master_stands_behind_what_it_set(
    key: VirtualKey, fields: dict[str, object], is_master: bool, granted: bool
) -> None:
    assert KeyPatch(fields=fields).apply(key, 1.0, "somebody", is_master=is_master).granted_by_master is granted
