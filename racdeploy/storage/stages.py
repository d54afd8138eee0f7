"""Folders of stages: found by what decides their content, worked in by one process, and gone on with after a kill.

A finished one carries ``stage.json`` and is reused. What a killed run left under other inputs is never gone on with,
and never removed: the line that says so is the caller's to print.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock; two builds in one work folder are then not told apart
    fcntl = None  # type: ignore[assignment]

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.storage.files import canonical_hash, disk_errors, read_json, write_atomic

_HASH = re.compile(r"[0-9a-f]{16,}")
_SHOWN = 40  # characters of a value in a message
_SCRATCH = "scratch-of-process-"


@dataclass(frozen=True)
class Stage:
    """A stage's folder, addressed by the hash of everything that decides its content.

    Args:
        folder: ``WORK/NAME-HASH``.
        inputs: what was hashed; kept in the folder so that a mismatch can be named.
        notice: what a user should know when the stage begins anew beside one that was left unfinished, or empty.
    """

    folder: Path
    inputs: Mapping[str, Any]
    notice: str = ""

    @classmethod
    def at(cls, work: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return where a stage is, or would be; nothing is made."""
        return cls(work / f"{name}-{canonical_hash(inputs)[:16]}", inputs)

    @classmethod
    def open(cls, work: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return the stage folder, made if need be, with its inputs recorded.

        Raises:
            ArtifactError: the folder holds other inputs, or another version of racdeploy left the stage half done.
            UsageError: another process works in the folder.
            EnvironmentFailure: the disk is full or not writable.
        """
        stage = cls.at(work, name, inputs)
        folder = stage.folder
        _refuse_other_version(work, name, inputs)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
            for partial in (
                sorted(folder.rglob(".*.partial")) if fcntl else ()
            ):  # nobody else writes here now
                partial.unlink() if partial.is_file() else shutil.rmtree(
                    partial, ignore_errors=True
                )
        record = folder / "inputs.json"
        if record.is_file():
            stage._check(read_json(record))
            return stage
        write_atomic(record, json.dumps(inputs, indent=1, sort_keys=True))
        return replace(stage, notice=_left_unfinished(stage, name))

    @property
    def finished(self) -> bool:
        """Whether the stage ended and may be reused."""
        return (self.folder / "stage.json").is_file()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the stage as ended."""
        write_atomic(self.folder / "stage.json", json.dumps(summary, indent=1, sort_keys=True))

    @property
    def summary(self) -> dict[str, Any]:
        """What :meth:`finish` was given."""
        return read_json(self.folder / "stage.json")

    def _check(self, recorded: Mapping[str, Any]) -> None:
        given = json.loads(json.dumps(self.inputs))
        if changed := _differences(recorded, given):
            raise ArtifactError(
                f"{self.folder} was made from other inputs; changed: {', '.join(changed)}",
                remedy="remove that folder, or use another --work folder",
            )


def finished_stages(work: Path, name: str) -> list[Stage]:
    """Return the stages of that name which ended, the newest first."""
    ended = sorted(work.glob(f"{name}-*/stage.json"), key=lambda file: file.stat().st_mtime)
    return [Stage(file.parent, read_json(file.with_name("inputs.json"))) for file in ended[::-1]]


@contextlib.contextmanager
def scratch_folder(work: Path, rank: int) -> Iterator[Path]:
    """Yield an empty folder for one process of a job, gone with the body; what killed processes left goes first.

    It takes its name when it is locked, so that one that is just being made is not taken for a left one.
    """
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        for left in work.glob(f"{_SCRATCH}*"):
            if fcntl is not None and not _in_use(left):
                shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}{rank}-", dir=work))
        _lock(made)
        folder = made.rename(work / made.name[1:])
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made in _locks:
            os.close(_locks.pop(made))


def _refuse_other_version(work: Path, name: str, inputs: Mapping[str, Any]) -> None:
    """Name a stage that differs in nothing but the version of racdeploy and was never finished."""
    decided_by_version = {"version", "code"}
    wanted = {
        k: v for k, v in json.loads(json.dumps(inputs)).items() if k not in decided_by_version
    }
    for record in sorted(work.glob(f"{name}-*/inputs.json")) if work.is_dir() else ():
        recorded = read_json(record)
        same = wanted == {k: v for k, v in recorded.items() if k not in decided_by_version}
        if (
            same
            and recorded.get("version") != inputs.get("version")
            and not (record.parent / "stage.json").is_file()
        ):
            raise ArtifactError(
                f"{record.parent} was left half done by racdeploy {recorded.get('version')}; "
                f"this is {inputs.get('version')}, which may give other results",
                remedy=f"rm -r {record.parent}, or finish it with the version that began it",
            )


def _left_unfinished(stage: Stage, name: str) -> str:
    """Return a line on the unfinished stages that a new one could be taken for, the likest first; empty without one.

    Those are the ones of the same model and output, and the one that differs in the model alone.
    """
    given = json.loads(json.dumps(stage.inputs))
    if "model" not in given:
        return ""
    found = []
    for record in sorted(stage.folder.parent.glob(f"{name}-*/inputs.json")):
        folder, recorded = record.parent, read_json(record)
        if folder == stage.folder or (folder / "stage.json").is_file() or _in_use(folder):
            continue
        different = {key for key in {*recorded, *given} if recorded.get(key) != given.get(key)}
        if not different & {"model", "name"} or different <= {"model", "traces_sha256"}:
            found.append((_differences(recorded, given), folder))
    if not found:
        return ""
    found.sort(key=lambda pair: len(pair[0]))
    changed, folder = found[0]
    others = (
        f" (also unfinished: {', '.join(other.name for _, other in found[1:])})"
        if found[1:]
        else ""
    )
    return (
        f"{folder} was left unfinished, with other inputs: {', '.join(changed)}{others}; "
        f"{stage.folder.name} begins anew\n  → to go on with the old one, undo the change; to remove it: rm -r {folder}"
    )


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], within: str = "") -> list[str]:
    """Return what differs, as ``part.key before -> after``; hashes and long values are left out."""
    found: list[str] = []
    for key in sorted({*left, *right}):
        before, after = left.get(key), right.get(key)
        if before == after:
            continue
        parts = [value for value in (before, after) if value is not None]
        if all(isinstance(part, Mapping) for part in parts):
            found += _differences(before or {}, after or {}, f"{within}{key}.")
        else:
            values = [json.dumps(value, ensure_ascii=False).strip('"') for value in (before, after)]
            shown = all(len(value) <= _SHOWN and not _HASH.fullmatch(value) for value in values)
            found.append(f"{within}{key} {values[0]} -> {values[1]}" if shown else f"{within}{key}")
    return found


_locks: dict[Path, int] = {}  # file descriptors, held until the process ends


def _lock(folder: Path) -> None:
    """Refuse to work in a folder that another process works in."""
    if fcntl is None or folder in _locks:
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for last in (False, False, True):  # another process that only looks holds it for a moment
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if last:
                os.close(descriptor)
                raise UsageError(
                    f"another racdeploy is working in {folder}",
                    remedy="wait for it, or use another --work folder",
                ) from error
            time.sleep(0.1)
    _locks[folder] = descriptor


def _in_use(folder: Path) -> bool:
    """Return whether another process works in a folder, or it cannot be known."""
    if fcntl is None or folder in _locks:
        return False
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
