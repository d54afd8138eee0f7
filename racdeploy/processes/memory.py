"""Memory of this process: resident, peak, and still available."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMORY_INFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def resident_bytes(entry: str = "VmRSS") -> int:
    """Return resident memory, now or at its peak (``VmHWM``); 0 if unknown.

    ``VmData`` is private memory, resident or not, as RLIMIT_DATA counts it.
    """
    return _read_table(_STATUS).get(entry, 0)


def free_bytes() -> int | None:
    """Return the memory that is still available, within a container's limit; None if unknown."""
    available = _read_table(_MEMORY_INFO).get("MemAvailable")
    limit = _read_number(_CONTROL_GROUP / "memory.max")
    used = _read_number(_CONTROL_GROUP / "memory.current")

    if limit is None or used is None:
        return available
    within_limit = max(0, limit - used)
    return within_limit if available is None else min(available, within_limit)


def _read_table(file: Path) -> dict[str, int]:
    """Return bytes by name from a file with lines ``Name:  number kB``."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}

    table = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            table[name] = int(words[0]) * 1024

    return table


def _read_number(file: Path) -> int | None:
    """Return the number in a file of a control group; None for ``max`` or no file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
