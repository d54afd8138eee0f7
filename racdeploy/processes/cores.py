"""Processor of this machine: cores that this process may use, and bfloat16."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"amx_bf16", "bf16"}  # the last one is ARM's


def available_cores() -> int:
    """Return the number of cores in this process's affinity, or of the machine without one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def has_fast_bfloat16() -> bool:
    """Return whether products are faster in bfloat16 than in float32; False if unknown.

    Intel's AVX-512 without AMX, as on many virtual machines, takes twice as long for them (84
    against 155 GFLOP/s on one core of a Xeon, torch 2.13); AMD's is several times as fast.
    """
    flags = {*read_cpu_info("flags", "Features").split()}
    is_amd = read_cpu_info("vendor_id") == "AuthenticAMD"
    return not _BFLOAT16_FLAGS.isdisjoint(flags) or (is_amd and "avx512_bf16" in flags)


def read_cpu_info(*names: str) -> str:
    """Return the first value of one of these names in Linux's list; empty if unknown."""
    with suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""
