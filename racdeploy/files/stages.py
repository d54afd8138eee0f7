"""Stage folders: named by a hash of their inputs, locked by one process, resumable.

A finished stage has ``stage.json`` and is reused. Other inputs belong to another folder.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from racdeploy.errors import ArtifactError
from racdeploy.files.locks import (
    is_folder_in_use,
    lock_folder,
    release_folder,
    remove_locked_folder,
)
from racdeploy.files.ownership import check_private, explain_foreign
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import canonical_hash, disk_errors, write_atomic

Inputs = Mapping[str, Any]
_HASH = re.compile(r"[0-9a-f]{16,}")
_SHOWN_CHARACTERS = 40  # characters of a value in a message
_SCRATCH = "scratch-of-process-"


@dataclass(frozen=True)
class Stage:
    """The folder of a stage, ``WORK/NAME-HASH``, named by the hash of all its inputs.

    Args:
        inputs: hashed, and recorded in the folder, so that a difference can be named.
        notice: for the user, on a similar stage that was left unfinished; or empty.
    """

    folder: Path
    inputs: Inputs
    notice: str = ""

    @classmethod
    def locate(cls, work: Path, name: str, inputs: Inputs) -> Stage:
        """Return a stage, whose folder need not exist."""
        return cls(work / f"{name}-{canonical_hash(inputs)[:16]}", inputs)

    @classmethod
    def open(cls, work: Path, name: str, inputs: Inputs) -> Stage:
        """Return a stage; make and lock its folder, and record its inputs.

        Raises:
            ArtifactError: it has other inputs.
            EnvironmentFailure: the folder is another user's or in use, or the disk is full or not
                writable.
        """
        stage = cls.locate(work, name, inputs)

        with disk_errors(stage.folder):
            stage.make_folder()
            try:
                lock_folder(stage.folder)
            except FileNotFoundError:  # a verification, waited for, removes it at its end
                stage.make_folder()
                lock_folder(stage.folder)
            # Partial files are of killed processes; the folder is locked, so none is in use.
            for partial in sorted(stage.folder.rglob(".*.partial")):
                if partial.is_file():
                    partial.unlink()
                else:
                    shutil.rmtree(partial, ignore_errors=True)

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

    def make_folder(self) -> None:
        """Make the folder; raise EnvironmentFailure for one that another user may have made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_private(self.folder, explain_foreign)

    @property
    def is_finished(self) -> bool:
        return _is_own(self.folder / "stage.json")

    def finish(self, summary: Inputs) -> None:
        write_atomic(self.folder / "stage.json", json.dumps(summary, indent=1, sort_keys=True))

    def reopen(self) -> None:
        """Make a finished stage unfinished; its files stay, and a later run resumes."""
        (self.folder / "stage.json").unlink()

    def release(self) -> None:
        """Let other processes work in the folder; else they wait for the end of this one."""
        release_folder(self.folder)

    def remove(self) -> None:
        """Remove the folder, also while other processes wait for it."""
        remove_locked_folder(self.folder)

    @property
    def summary(self) -> Json:
        """The summary that :meth:`finish` has written; ArtifactError for a key it lacks."""
        return _Summary(read_json(self.folder / "stage.json"))


class _Summary(dict[str, Any]):
    def __missing__(self, key: str) -> NoReturn:
        raise ArtifactError(
            "damaged-stage",
            f"stage.json of a stage lacks {key!r}",
            remedy="remove the stages that racdeploy cache lists, or use another --work folder",
        )


def finished_stages(work: Path, name: str) -> list[Stage]:
    """Return the finished stages of a name, newest first."""
    own = filter(_is_own, work.glob(f"{name}-*/stage.json"))
    records = sorted(own, key=lambda file: file.stat().st_mtime)
    return [Stage(file.parent, read_json(file.with_name("inputs.json"))) for file in records[::-1]]


@contextmanager
def scratch_folder(work: Path, rank: int) -> Iterator[Path]:
    """Yield an empty folder for one process of a job; remove it after the body.

    It is renamed once it is locked, so that a new folder never seems abandoned.
    """
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        for abandoned in work.glob(f"{_SCRATCH}*"):
            if not is_folder_in_use(abandoned):
                shutil.rmtree(abandoned, ignore_errors=True)

        hidden = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH}{rank}-", dir=work))
        lock_folder(hidden)
        folder = hidden.rename(work / hidden.name[1:])

    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release_folder(hidden)


def _left_unfinished(stage: Stage, name: str) -> str:
    """Return a notice on stages that the user may have meant, or an empty string.

    These are unfinished ones, and a finished one that only another release has made.
    """
    inputs = _as_json(stage.inputs)
    if "model" not in inputs:
        return ""

    candidates = []
    for record in filter(_is_own, sorted(stage.folder.parent.glob(f"{name}-*/inputs.json"))):
        folder = record.parent
        if folder == stage.folder or is_folder_in_use(folder):
            continue

        recorded = read_json(record)
        different = {key for key in {*recorded, *inputs} if recorded.get(key) != inputs.get(key)}
        if (folder / "stage.json").is_file():
            if "version" in different <= {"version", "code"}:
                release = recorded.get("version")
                return f"{folder} is of racdeploy {release}: {stage.folder.name} is computed again"
            continue

        # A stage of another model or name is other work, unless little else differs.
        if not different & {"model", "name"} or different <= {"model", "traces_sha256"}:
            candidates.append((_differences(recorded, inputs), folder))

    if not candidates:
        return ""

    (changed, folder), *others = sorted(candidates, key=lambda pair: len(pair[0]))
    names = ", ".join(other.name for _, other in others)
    also = f" (also unfinished: {names})" if names else ""
    return (
        f"{folder} was left unfinished, with other inputs: {', '.join(changed)}{also}; "
        f"{stage.folder.name} starts from scratch\n"
        f"  → to resume the old one, undo the change; to remove it: rm -r {folder}"
    )


def _is_own(file: Path) -> bool:
    """Return whether a file is there, in a folder that no other user has made."""
    return file.is_file() and not explain_foreign(file.parent)


def _differences(left: Inputs, right: Inputs, within: str = "") -> list[str]:
    """Return the differences as ``part.key before -> after``, without hashes and long values."""
    differences = []

    for key in sorted({*left, *right}):
        before, after = left.get(key), right.get(key)
        if before == after:
            continue

        parts = [value for value in (before, after) if value is not None]
        if all(isinstance(part, Mapping) for part in parts):
            differences += _differences(before or {}, after or {}, f"{within}{key}.")
            continue

        texts = [json.dumps(value, ensure_ascii=False).strip('"') for value in (before, after)]
        change = ""
        if all(len(text) <= _SHOWN_CHARACTERS and not _HASH.fullmatch(text) for text in texts):
            change = f" {texts[0]} -> {texts[1]}"
        differences.append(f"{within}{key}{change}")

    return differences


def _as_json(values: Inputs) -> Json:
    """Return values as a JSON file holds them: tuples as lists."""
    converted: Json = json.loads(json.dumps(values))
    return converted
