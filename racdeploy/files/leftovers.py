"""What builds left in the user's cache: stage folders and unpacked files, and how to remove it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy.errors import UsageError
from racdeploy.files.caches import cache_folder, default_work
from racdeploy.files.locks import is_folder_in_use, lock_folder, release_folder

_STAGE = re.compile(r"[a-z]+-[0-9a-f]{16}")
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Leftover:
    """A stage folder or an unpacked file.

    Args:
        state: ``finished``, ``unfinished`` or ``in use``; a file is ``unpacked``.
        used_s: when anything in it was last written or read, in seconds since 1970.
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


def list_leftovers(work: Path | None = None) -> list[Leftover]:
    """Return what lies in a work folder and beside it, the largest first."""
    found = []

    folder = work or default_work()
    for stage in folder.glob("*-*"):
        if stage.is_dir() and _STAGE.fullmatch(stage.name):
            found.append(_describe(stage, _read_state(stage)))

    for file in cache_folder("unpacked").glob("*"):
        if file.is_file():
            found.append(_describe(file, "unpacked"))

    return sorted(found, key=lambda leftover: -leftover.size_bytes)


def choose(
    leftovers: Sequence[Leftover], names: Sequence[str], older_days: float | None
) -> list[Leftover]:
    """Return what is to be removed: by name, by age, or both.

    Raises:
        UsageError: nothing was chosen, a name is unknown, or a process works in a named folder.
    """
    if not names and older_days is None:
        raise UsageError(
            "nothing-to-remove",
            "what is to be removed?",
            remedy="name it as racdeploy cache ls does, or give --older 30",
        )

    by_name = {leftover.name: leftover for leftover in leftovers}
    for name in names:
        if name not in by_name:
            raise UsageError(
                "unknown-cache-entry",
                f"there is no {name} in the cache",
                remedy="racdeploy cache ls",
            )
        if by_name[name].state == "in use":
            raise UsageError(
                "work-folder-in-use",
                f"another racdeploy is working in {by_name[name].path}",
                remedy="wait for it",
            )

    chosen = []
    for leftover in leftovers:
        is_old = older_days is None or leftover.idle_days >= older_days
        is_named = not names or leftover.name in names
        if is_old and is_named and leftover.state != "in use":
            chosen.append(leftover)

    return chosen


def remove(leftover: Leftover) -> None:
    """Remove a file, or a folder while no other process can begin to work in it."""
    if leftover.path.is_file():
        leftover.path.unlink()
        return

    lock_folder(leftover.path)
    try:
        shutil.rmtree(leftover.path)
    finally:
        release_folder(leftover.path)


def _read_state(stage: Path) -> str:
    if (stage / ".lock").is_file() and is_folder_in_use(stage):
        return "in use"
    return "finished" if (stage / "stage.json").is_file() else "unfinished"


def _describe(path: Path, state: str) -> Leftover:
    if path.is_file():
        files = [path]
    else:
        files = [file for file in path.rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]

    # The lock is touched by whoever looks.
    times = [path.stat().st_mtime]
    for file, stat in zip(files, stats, strict=True):
        if file.name != ".lock":
            times.append(max(stat.st_mtime, stat.st_atime))

    size_bytes = sum(stat.st_size for stat in stats)
    return Leftover(path, state, size_bytes, max(times[1:] or times))
