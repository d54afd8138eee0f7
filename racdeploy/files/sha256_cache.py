"""SHA-256 checks of whole files, remembered until the file changes.

A file counts as unchanged while its path, size, times, inode and a sample of its bytes are equal. A
program cannot set back the time of the last change (ctime), but one that has the file mapped may
write without moving it, so nothing is remembered of a file of another user, or that all may write.
Records are in the user's cache, and count only where no other user may write.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_IWOTH

from racdeploy.errors import ArtifactError, RacdeployError
from racdeploy.files.caches import cache_folder
from racdeploy.files.ownership import (
    explain_foreign,
    explain_not_private,
    make_private,
    open_private,
)
from racdeploy.files.writing import file_sha256, write_atomic

FileState = list[str | int]

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SETTLED_S = 1.0  # a file may change twice within the resolution of its times


def file_state(file: Path) -> FileState:
    """Return the state of a file, which differs after a change; OSError without a file."""
    with file.open("rb", buffering=0) as stream:
        stat = os.fstat(stream.fileno())
        sample = hashlib.sha256()

        last = max(0, stat.st_size - _SAMPLE_BYTES)
        for index in range(_SAMPLES):
            stream.seek(last * index // (_SAMPLES - 1))
            sample.update(stream.read(_SAMPLE_BYTES))

    times = stat.st_mtime_ns, stat.st_ctime_ns
    return [str(file.resolve()), stat.st_size, *times, stat.st_ino, sample.hexdigest()[:32]]


def has_sha256(file: Path, sha256: str) -> bool:
    """Return whether a file has this SHA-256; an unchanged file is not read again.

    Later changes are for :func:`refuse_changed`.
    """
    digest = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    record = cache_folder("checked") / f"{digest[:32]}.json"

    state = file_state(file)
    if _read(record) == [sha256, state]:
        return True
    if file_sha256(file) != sha256:
        return False
    if state == file_state(file):  # else it may have changed while it was read
        _remember(record, sha256, state)
    return True


def take_states(folder: Path, files: Iterable[str]) -> dict[str, FileState]:
    """Return the states of some files, taken before they are checked."""
    return {name: file_state(folder / name) for name in files}


def refuse_changed(folder: Path, files: Mapping[str, str], states: Mapping[str, FileState]) -> None:
    """Raise ArtifactError for a file whose content changed after its state was taken.

    A new link or a backup moves the ctime too: then the content decides.

    Args:
        files: SHA-256 by name.
    """
    for name, sha256 in files.items():
        file = folder / name
        if file_state(file) != states.get(name) and not has_sha256(file, sha256):
            raise ArtifactError(
                "artifact-changed",
                f"{file} changed while it was in use",
                remedy="wait until the copy is complete, then run the same command again",
            )


def _read(record: Path) -> object:
    try:
        with open(open_private(record), "rb") as stream:
            return json.load(stream)
    except (OSError, ValueError, RecursionError):  # missing, damaged, or writable for others
        return None


def _remember(record: Path, sha256: str, state: FileState) -> None:
    path, _, modified_ns, changed_ns, *_ = state
    file = Path(str(path))
    if explain_foreign(file) or file.stat().st_mode & S_IWOTH:
        return

    is_settled = time.time() - max(int(modified_ns), int(changed_ns)) / 1e9 > _SETTLED_S
    if not is_settled:
        return

    # Without a cache that can be written, the file is hashed again next time.
    with suppress(OSError, RacdeployError):
        make_private(record.parent)
        if not explain_not_private(record.parent):
            write_atomic(record, json.dumps([sha256, state]), mode=0o600)
