"""Processor of this machine: cores that this process may use, and bfloat16."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's


def available_cores() -> int:
    """Return the number of cores in this process's affinity, or of the machine without one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions; False if unknown."""
    return not _BFLOAT16_FLAGS.isdisjoint(read_cpu_info("flags", "Features").split())


def read_cpu_info(*names: str) -> str:
    """Return the first value of one of these names in Linux's list; empty if unknown."""
    with suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""
