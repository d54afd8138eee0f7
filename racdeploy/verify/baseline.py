"""Dense answers that were recorded when a bundle was built, and whether they may stand beside answers of now.

A baseline is a bundle: its manifest names the dense model's files and how it decoded, its records hold the answers.
What cannot be compared is refused; what only may differ, as a version, is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from racdeploy.accel import STOCK
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.manifest import Manifest
from racdeploy.recipe import Recipe, Verification, validate
from racdeploy.report.model import ArmSummary, Record, Report
from racdeploy.storage.files import file_sha256, read_json
from racdeploy.tasks import Problem

_NO_MATTER = frozenset(
    {"engine", "torch", "transformers", "gguf", "python", "numpy"}
)  # engines compute by themselves
DECODING = ("max_new_tokens", "max_thinking_tokens", "temperature", "seed")


@dataclass(frozen=True)
class Baseline:
    """The dense arm of a bundle.

    Args:
        folder: the bundle.
        manifest: its manifest.
        recipe: how it was built.
        report: of its own verification.
        dense: dense records, in prompt order.
        pruned: pruned records, in prompt order.
    """

    folder: Path
    manifest: Manifest
    recipe: Recipe
    report: Report
    dense: tuple[Record, ...]
    pruned: tuple[Record, ...]

    @classmethod
    def read(cls, folder: Path) -> Baseline:
        """Read a bundle's records.

        Raises:
            ArtifactError: no bundle, or records that are damaged or too few.
        """
        manifest = Manifest.read(folder)
        try:
            lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
            records = tuple(Record.model_validate_json(line) for line in lines)
            report = Report.model_validate(read_json(folder / "report.json"))
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            first = str(error).splitlines()[0]
            raise ArtifactError(
                f"{folder}: the records are damaged: {first}", remedy="build the bundle again"
            ) from error
        recipe = validate(Recipe, manifest.recipe, f"{folder}/racdeploy.json")
        dense, pruned = (tuple(r for r in records if r.arm == name) for name in ("dense", "pruned"))
        found = cls(folder, manifest, recipe, report, dense, pruned)
        expected = (
            found.arm("dense").prompts if any(arm.name == "dense" for arm in report.arms) else 0
        )
        if not dense or len(dense) != expected:
            raise ArtifactError(
                f"{folder}/records.jsonl holds {len(dense)} dense records, its report counts {expected}",
                remedy="copy the bundle again, or build it again",
            )
        return found

    def arm(self, name: str) -> ArmSummary:
        """Return the summary of an arm."""
        return next(arm for arm in self.report.arms if arm.name == name)

    @property
    def problems(self) -> list[Problem]:
        """The problems that were asked, in order."""
        first = {record.prompt: record for record in self.dense}
        return [
            Problem(r.question, r.gold, task=r.task, scorer=r.scorer)
            for _, r in sorted(first.items())
        ]

    def check_model(self, manifest: Manifest) -> None:
        """Refuse answers of another model.

        Raises:
            ArtifactError: the dense models differ, naming the files.
        """
        ours, theirs = manifest.base.get("files", {}), self.manifest.base.get("files", {})
        changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if changed or not ours:
            raise ArtifactError(
                f"{self.folder} has the answers of another dense model, {self.manifest.base.get('name')!r}: "
                f"{', '.join(changed) or 'it names no files'} differ",
                remedy="give a bundle of the same dense model with --baseline",
            )

    def check_artifact(self, path: Path) -> None:
        """Refuse a dense artifact that is not the one of this bundle's build.

        Raises:
            ArtifactError: another hash.
        """
        known, found = self.arm("dense").files, file_sha256(path)
        if found not in known.values():
            said = ", ".join(f"{sha256[:16]}…" for sha256 in known.values()) or "none"
            raise ArtifactError(
                f"{path} is not the dense artifact of this bundle: SHA-256 {found[:16]}…, recorded {said}",
                remedy="give the dense file that the build left below its --work folder, in export-*; "
                "`racdeploy export` writes the same one only where no importance chose the scales",
            )

    def answers(self, problems: Sequence[Problem], settings: Verification) -> tuple[Record, ...]:
        """Return the dense records of these problems, numbered by them.

        Raises:
            UsageError: they decoded otherwise, or some were never answered.
        """
        built = self.recipe.verify
        changed = [name for name in DECODING if getattr(built, name) != getattr(settings, name)]
        if changed:
            what = ", ".join(
                f"{n} {getattr(built, n)} and not {getattr(settings, n)}" for n in changed
            )
            raise UsageError(
                f"the dense answers in {self.folder} were made with {what}",
                remedy="give the dense artifact with --baseline, which answers anew",
            )
        known = {(r.question, r.gold, r.sample): r for r in self.dense}
        wanted = [
            (i, p, sample) for i, p in enumerate(problems) for sample in range(settings.samples)
        ]
        found = [(i, known.get((p.question, p.gold, sample))) for i, p, sample in wanted]
        if missing := sum(record is None for _, record in found):
            raise UsageError(
                f"{missing} of {len(wanted)} answers of the dense model are not in {self.folder}",
                remedy="give the dense artifact with --baseline, a bundle with more prompts, or a smaller --tier",
            )
        return tuple(
            record.model_copy(update={"prompt": i}) for i, record in found if record is not None
        )


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints and may change answers, as ``name VALUE, now VALUE``."""
    engines = [part.get("engine", {}) for part in (recorded, now)]
    named = (
        {"kernels": STOCK, **part} for part in (recorded, now)
    )  # older reports name sparse ones only
    rest = [{name: part[name] for name in part if name not in _NO_MATTER} for part in named]
    return [
        f"{name} {before.get(name)}, now {after.get(name)}"
        for before, after in (rest, engines)
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
