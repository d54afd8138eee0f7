"""How many CPU cores this process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return the cores of this process's affinity, or of the machine where there is none."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
