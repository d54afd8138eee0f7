"""Judge processor time by a yardstick of the same moment: what plain Python takes right now.

A second of processor time holds less work where other programs share the caches, the memory and
the core. So no test decides by seconds alone: what took longer than its bar is compared with a loop
that runs right after it, in the same process.
"""

from __future__ import annotations

import time

REFERENCE_SECONDS = 0.03
"""A million steps of an empty loop, on the processor on which the bars were set."""
MARGIN = 3.0
"""So many times its bar may anything take: an input without a bound takes much more."""


def is_too_long(took_s: float, bar_s: float) -> bool:
    """Tell whether something took far longer than its bar, as fast as this processor is now.

    Args:
        took_s: processor time that was measured just before this call.
        bar_s: what it takes at most on the processor of ``REFERENCE_SECONDS``.
    """
    return took_s > bar_s and took_s > MARGIN * measure_slowness() * bar_s


def measure_slowness() -> float:
    """Return how many times slower than the reference Python runs now, at least 1."""
    trials = []
    for _ in range(3):
        began_s = time.process_time()
        for _ in range(1_000_000):
            pass
        trials.append(time.process_time() - began_s)

    return max(1.0, max(trials) / REFERENCE_SECONDS)
