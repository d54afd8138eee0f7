"""Processor of this machine: cores that this process may use, their cache, and bfloat16."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CORES = Path("/sys/devices/system/cpu")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's


def available_cores() -> int:
    """Return the number of cores in this process's affinity, or of the machine without one."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def last_level_cache_bytes() -> int:
    """Return the size of the last-level caches of those cores together; 0 if unknown."""
    affinity = getattr(os, "sched_getaffinity", None)

    sizes: dict[str, int] = {}  # by the list of cores that share a cache
    for core in affinity(0) if affinity else ():
        levels = dict(map(_read_cache, (_CORES / f"cpu{core}" / "cache").glob("index*")))
        if levels:
            shared, size_bytes = levels[max(levels)]
            sizes[shared] = size_bytes

    return sum(sizes.values())


def _read_cache(folder: Path) -> tuple[int, tuple[str, int]]:
    """Return the level of a cache, the cores that share it, and its size in bytes."""
    try:
        texts = [(folder / name).read_text() for name in ("level", "shared_cpu_list", "size")]
        level, shared, size = map(str.strip, texts)
        return int(level), (shared, int(size.removesuffix("K")) << 10)
    except (OSError, ValueError):
        return 0, ("", 0)


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
