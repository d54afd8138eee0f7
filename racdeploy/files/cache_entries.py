"""List and remove stage folders and unpacked files in the user's cache."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.caches import cache_folder, default_work_folder
from racdeploy.files.locks import is_folder_in_use, lock_folder, remove_locked_folder

_STAGE_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}")
_DAY_S = 86_400.0


@dataclass(frozen=True)
class CacheEntry:
    """A stage folder or an unpacked file.

    Args:
        state: ``finished``, ``unfinished`` or ``in use``; for a file, ``unpacked``.
        used_s: time of the last write or read in it, in seconds since 1970.
    """

    path: Path
    state: str
    size_bytes: int
    used_s: float

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def idle_days(self) -> float:
        return max(0.0, time.time() - self.used_s) / _DAY_S


def list_cache_entries(work: Path | None) -> list[CacheEntry]:
    """Return the stages of a work folder and the unpacked files of the cache, largest first."""
    entries = []
    folder = work or default_work_folder()
    for stage in folder.glob("*-*"):
        if stage.is_dir() and not stage.is_symlink() and _STAGE_NAME.fullmatch(stage.name):
            state = "finished" if (stage / "stage.json").is_file() else "unfinished"
            if (stage / ".lock").is_file() and is_folder_in_use(stage):
                state = "in use"
            entries.append(_describe(stage, state))

    unpacked = cache_folder("unpacked").glob("*")
    entries += [_describe(file, "unpacked") for file in unpacked if file.is_file()]
    return sorted(entries, key=lambda entry: -entry.size_bytes)


def select_entries(
    entries: Sequence[CacheEntry], names: Sequence[str], older_days: float | None
) -> list[CacheEntry]:
    """Return the entries to be removed, by name, by age, or both.

    Raises:
        UsageError: neither name nor age is given, a name is unknown, or a process works there.
    """
    if not names and older_days is None:
        raise UsageError(
            "nothing-to-remove",
            "nothing is named that shall be removed",
            remedy="give names from racdeploy cache ls, or an age as --older 30",
        )

    by_name = {entry.name: entry for entry in entries}
    for name in names:
        if name not in by_name:
            raise UsageError(
                "unknown-cache-entry",
                f"there is no {name} in the cache",
                remedy="racdeploy cache ls",
            )
        if by_name[name].state == "in use":
            raise EnvironmentFailure(
                "work-folder-in-use",
                f"another racdeploy is working in {by_name[name].path}",
                remedy="wait for it",
            )

    return [
        entry
        for entry in entries
        if (older_days is None or entry.idle_days >= older_days)
        and (not names or entry.name in names)
        and entry.state != "in use"
    ]


def remove_entry(entry: CacheEntry) -> None:
    """Remove a file, or a folder that is locked meanwhile."""
    if entry.path.is_file():
        entry.path.unlink()
        return

    lock_folder(entry.path)
    remove_locked_folder(entry.path)


def _describe(path: Path, state: str) -> CacheEntry:
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    stats = [file.stat() for file in files]

    # Looking at the state of a stage touches its lock file.
    times = [
        max(stat.st_mtime, stat.st_atime)
        for file, stat in zip(files, stats, strict=True)
        if file.name != ".lock"
    ]

    # Of a file that several stages share by hard links, each has its part.
    size_bytes = sum(stat.st_size // stat.st_nlink for stat in stats)
    return CacheEntry(path, state, size_bytes, max(times or [path.stat().st_mtime]))
