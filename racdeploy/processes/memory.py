"""How much memory this process has, has had at most, and can still get."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def resident_bytes(entry: str = "VmRSS") -> int:
    """Return resident memory, now or at its peak (``VmHWM``); 0 where the system does not say.

    ``VmData`` is private memory, resident or not, as RLIMIT_DATA counts it.
    """
    return _read_table(_STATUS).get(entry, 0)


def free_bytes() -> int | None:
    """Return what can still be had, of the machine and of a container's limit; None if unknown."""
    found = _read_table(_MACHINE).get("MemAvailable")
    limit = _read_number(_GROUP / "memory.max")
    used = _read_number(_GROUP / "memory.current")

    if limit is None or used is None:
        return found
    left = max(0, limit - used)
    return left if found is None else min(found, left)


def _read_table(file: Path) -> dict[str, int]:
    """Return bytes by name, of a file whose lines are ``Name:  number kB``."""
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
    """Return the number that a file of a control group holds; None for ``max`` or no file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
