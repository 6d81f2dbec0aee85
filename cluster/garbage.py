"""Python's garbage collector in a process that serves: it looks at what is new, and seldom.

Every token makes a few short-lived objects without cycles, which reference counts free. With Python's own threshold of
700 the collector ran for some 7 % of a gateway's time (`python -m benchmarks.relay`, py-spy).
"""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000  # a few MB


def collect_seldom() -> None:
    """To be called once all that stays is loaded; what is there now is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
