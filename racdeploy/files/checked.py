"""Checks of whole files that are made once: what passed is remembered until the file changes.

A file is the same while its path, size, times, inode and a sample of its bytes are. The time of the
last change (ctime) cannot be set back by a program. What is remembered lies in the user's cache,
and counts only where nobody else may write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from racdeploy.errors import RacdeployError
from racdeploy.files.caches import cache_folder
from racdeploy.files.ownership import explain_foreign, make_private, open_own
from racdeploy.files.writing import canonical_hash, file_sha256, write_atomic

State = list[str | int]

_PIECES = 16
_PIECE_BYTES = 4096
_SETTLED_S = 1.0  # a file that changed since then may change again without another time
_TRIES = 3


def file_state(file: Path) -> State:
    """Return what tells a file from a changed one; ``OSError`` where there is none."""
    with file.open("rb", buffering=0) as stream:
        found = os.fstat(stream.fileno())
        sample = hashlib.sha256()

        last = max(0, found.st_size - _PIECE_BYTES)
        for piece in range(_PIECES):
            stream.seek(last * piece // (_PIECES - 1))
            sample.update(stream.read(_PIECE_BYTES))

    times = found.st_mtime_ns, found.st_ctime_ns
    return [str(file.resolve()), found.st_size, *times, found.st_ino, sample.hexdigest()[:32]]


def has_sha256(file: Path, sha256: str) -> bool:
    """Return whether a file has a hash; it is not read again until it changes."""
    digest = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    record = cache_folder("checked") / f"{digest[:32]}.json"

    for _ in range(_TRIES):
        state = file_state(file)
        if _read(record) == [sha256, state]:
            return True
        if file_sha256(file) != sha256:
            return False
        if state == file_state(file):  # otherwise it was replaced meanwhile
            _remember(record, sha256, state)
            return True

    return False


def _read(record: Path) -> object:
    try:
        with open(open_own(record), "rb") as stream:
            key, state, digest = json.load(stream)
    except (OSError, ValueError, TypeError, RecursionError):  # none, damaged, or somebody else's
        return None
    return [key, state] if digest == canonical_hash([key, state]) else None


def _remember(record: Path, sha256: str, state: State) -> None:
    _, _, modified_ns, changed_ns, *_ = state
    is_settled = time.time() - max(int(modified_ns), int(changed_ns)) / 1e9 > _SETTLED_S
    if not is_settled:
        return

    # A cache that cannot be written: the file is checked again next time.
    with contextlib.suppress(OSError, RacdeployError):
        make_private(record.parent)
        if not explain_foreign(record.parent):
            text = json.dumps([sha256, state, canonical_hash([sha256, state])])
            write_atomic(record, text, mode=0o600)
