"""What this process may use of the processor: cores, their last-level cache, and which products."""

from __future__ import annotations

import os
from pathlib import Path

_ABOUT = Path("/proc/cpuinfo")
_CORES = Path("/sys/devices/system/cpu")
_SHORT = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's


def available_cores() -> int:
    """Return the cores of this process's affinity, or of the machine where there is none."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cache_bytes() -> int:
    """Return the last-level cache of those cores, all of its parts; 0 where it is not known."""
    affinity = getattr(os, "sched_getaffinity", None)

    parts: dict[str, int] = {}  # by the cores that share one
    for core in affinity(0) if affinity else ():
        levels = dict(map(_read_cache, (_CORES / f"cpu{core}" / "cache").glob("index*")))
        if levels:
            shared, size_bytes = levels[max(levels)]
            parts[shared] = size_bytes

    return sum(parts.values())


def _read_cache(folder: Path) -> tuple[int, tuple[str, int]]:
    """Return the level of a cache, the cores that share it, and its bytes."""
    try:
        texts = [(folder / name).read_text() for name in ("level", "shared_cpu_list", "size")]
        level, shared, size = map(str.strip, texts)
        return int(level), (shared, int(size.removesuffix("K")) << 10)
    except (OSError, ValueError):
        return 0, ("", 0)


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
