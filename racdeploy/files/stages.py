"""Folders of stages: addressed by what decides them, used by one process, resumable.

A finished one has ``stage.json`` and is reused; under other inputs it is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError
from racdeploy.files.locks import is_folder_in_use, lock_folder, release_folder
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import canonical_hash, disk_errors, write_atomic

Inputs = Mapping[str, Any]
_HASH = re.compile(r"[0-9a-f]{16,}")
_SHOWN = 40  # characters of a value in a message
_SCRATCH = "scratch-of-process-"


@dataclass(frozen=True)
class Stage:
    """A stage's folder, ``WORK/NAME-HASH``, addressed by everything that decides its content.

    Args:
        inputs: what was hashed; kept in the folder so that a mismatch can be named.
        notice: what a user should know where one was left unfinished beside it, or empty.
    """

    folder: Path
    inputs: Inputs
    notice: str = ""

    @classmethod
    def at(cls, work: Path, name: str, inputs: Inputs) -> Stage:
        """Return where a stage is, or would be; nothing is made."""
        return cls(work / f"{name}-{canonical_hash(inputs)[:16]}", inputs)

    @classmethod
    def open(cls, work: Path, name: str, inputs: Inputs) -> Stage:
        """Return the stage folder, made if need be, with its inputs recorded.

        Raises:
            ArtifactError: it holds other inputs, or another version of racdeploy left it half done.
            UsageError: another process works in the folder.
            EnvironmentFailure: the disk is full or not writable.
        """
        stage = cls.at(work, name, inputs)

        _refuse_other_version(work, name, inputs)
        with disk_errors(stage.folder):
            stage.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(stage.folder)
            _remove_partial(stage.folder)

        record = stage.folder / "inputs.json"
        if record.is_file():
            if changed := _differences(read_json(record), _as_json(inputs)):
                raise ArtifactError(
                    "stage-of-other-inputs",
                    f"{stage.folder} was made from other inputs; changed: {', '.join(changed)}",
                    remedy="remove that folder, or use another --work folder",
                )
            return stage

        write_atomic(record, json.dumps(inputs, indent=1, sort_keys=True))
        return replace(stage, notice=_left_unfinished(stage, name))

    @property
    def finished(self) -> bool:
        return (self.folder / "stage.json").is_file()

    def finish(self, summary: Inputs) -> None:
        write_atomic(self.folder / "stage.json", json.dumps(summary, indent=1, sort_keys=True))

    @property
    def summary(self) -> Json:
        """What :meth:`finish` was given."""
        return read_json(self.folder / "stage.json")


def finished_stages(work: Path, name: str) -> list[Stage]:
    """Return the stages of that name which ended, the newest first."""
    ended = sorted(work.glob(f"{name}-*/stage.json"), key=lambda file: file.stat().st_mtime)
    return [Stage(file.parent, read_json(file.with_name("inputs.json"))) for file in ended[::-1]]


@contextlib.contextmanager
def scratch_folder(work: Path, rank: int) -> Iterator[Path]:
    """Yield an empty folder for one process of a job, gone with the body.

    It takes its name when it is locked, so one just being made does not look left behind.
    """
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        for left in work.glob(f"{_SCRATCH}*"):
            if not is_folder_in_use(left):
                shutil.rmtree(left, ignore_errors=True)

        made = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}{rank}-", dir=work))
        lock_folder(made)
        folder = made.rename(work / made.name[1:])

    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release_folder(made)


def _remove_partial(folder: Path) -> None:
    """Remove what a killed process left half written; the folder is locked, so nobody writes it."""
    for partial in sorted(folder.rglob(".*.partial")):
        if partial.is_file():
            partial.unlink()
        else:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_other_version(work: Path, name: str, inputs: Inputs) -> None:
    """Refuse where an unfinished stage differs in nothing but the version of racdeploy."""

    def without_version(values: Inputs) -> Json:
        return {key: value for key, value in values.items() if key not in ("version", "code")}

    wanted = without_version(_as_json(inputs))
    for folder, recorded in _unfinished(work, name):
        left = recorded.get("version")
        here = inputs.get("version")

        if left != here and without_version(recorded) == wanted:
            raise ArtifactError(
                "stage-of-other-version",
                f"{folder} was left half done by racdeploy {left}; "
                f"this is {here}, which may give other results",
                remedy=f"rm -r {folder}, or finish it with the version that began it",
            )


def _left_unfinished(stage: Stage, name: str) -> str:
    """Return a line on unfinished stages that a user may have meant; empty without one."""
    given = _as_json(stage.inputs)
    if "model" not in given:
        return ""

    found = []
    for folder, recorded in _unfinished(stage.folder.parent, name):
        if folder == stage.folder or is_folder_in_use(folder):
            continue

        different = {key for key in {*recorded, *given} if recorded.get(key) != given.get(key)}
        if not different & {"model", "name"} or different <= {"model", "traces_sha256"}:
            found.append((_differences(recorded, given), folder))

    if not found:
        return ""

    (changed, folder), *others = sorted(found, key=lambda pair: len(pair[0]))
    names = ", ".join(other.name for _, other in others)
    also = f" (also unfinished: {names})" if names else ""
    return (
        f"{folder} was left unfinished, with other inputs: {', '.join(changed)}{also}; "
        f"{stage.folder.name} starts from scratch\n"
        f"  → to resume the old one, undo the change; to remove it: rm -r {folder}"
    )


def _unfinished(work: Path, name: str) -> Iterator[tuple[Path, Json]]:
    for record in sorted(work.glob(f"{name}-*/inputs.json")):
        if not (record.parent / "stage.json").is_file():
            yield record.parent, read_json(record)


def _differences(left: Inputs, right: Inputs, within: str = "") -> list[str]:
    """Return what differs, as ``part.key before -> after``; hashes and long values are left out."""
    found: list[str] = []

    for key in sorted({*left, *right}):
        before, after = left.get(key), right.get(key)
        if before == after:
            continue

        parts = [value for value in (before, after) if value is not None]
        if all(isinstance(part, Mapping) for part in parts):
            found += _differences(before or {}, after or {}, f"{within}{key}.")
            continue

        texts = [json.dumps(value, ensure_ascii=False).strip('"') for value in (before, after)]
        change = ""
        if all(map(_is_short, texts)):
            change = f" {texts[0]} -> {texts[1]}"
        found.append(f"{within}{key}{change}")

    return found


def _is_short(text: str) -> bool:
    return len(text) <= _SHOWN and not _HASH.fullmatch(text)


def _as_json(values: Inputs) -> Json:
    """Return values as they are read back from a file: tuples as lists."""
    read: Json = json.loads(json.dumps(values))
    return read
