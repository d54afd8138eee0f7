"""Last-level caches of the cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CORES = Path("/sys/devices/system/cpu")


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
