"""What this process may use of the processor: how many cores, and which products."""

from __future__ import annotations

import os
from pathlib import Path

_ABOUT = Path("/proc/cpuinfo")
_SHORT = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's


def available_cores() -> int:
    """Return the cores of this process's affinity, or of the machine where there is none."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Return whether the processor has products of bfloat16, as far as the system tells."""
    try:
        lines = _ABOUT.read_text().splitlines()
    except OSError:
        return False

    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return not _SHORT.isdisjoint(flags.split())

    return False
