"""Python's collector of reference cycles, told what there is to find here."""

import gc
from typing import Final

#: Objects made and not freed before the youngest are looked at, and how many such looks make one at the older ones.
#: Requests leave no cycles behind (``tests/test_garbage.py``): what is found is nearly always nothing, and Python's own
#: settings look for it every other request, at a quarter of all CPU time.
_THRESHOLDS: Final = (50_000, 10, 10)


def settle_in() -> None:
    """Take all that was made so far for what stays, and look for garbage seldom from now on. To be called once, when
    everything is wired: a look at all objects then takes as long as what came since is large."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
