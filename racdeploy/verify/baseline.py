"""Dense answers that a bundle recorded, and whether answers of now may be compared with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.toml import validate
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from racdeploy.recipe import Recipe, Verification
from racdeploy.report.files import read_records, read_report
from racdeploy.results.answers import ArmSummary, Record
from racdeploy.results.report import Report
from racdeploy.sparse_kernels import STOCK
from racdeploy.tasks import Problem
from racdeploy.verify.answers import DECODING

# Engines compute by themselves, and their settings are compared one by one.
_NO_MATTER = frozenset({"engine", "torch", "transformers", "gguf", "python", "numpy"})


@dataclass(frozen=True)
class Baseline:
    """A bundle with its report and the records of both arms, in prompt order."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    report: Report
    dense: tuple[Record, ...]
    pruned: tuple[Record, ...]

    @classmethod
    def read(cls, folder: Path) -> Baseline:
        """Read a bundle's records; ArtifactError where they are missing, damaged or too few."""
        manifest = Manifest.read(folder)
        records = read_records(folder)
        report = read_report(folder)
        dense = tuple(record for record in records if record.arm == "dense")
        pruned = tuple(record for record in records if record.arm == "pruned")

        expected = sum(arm.prompts for arm in report.arms if arm.name == "dense")
        if not dense or len(dense) != expected:
            raise ArtifactError(
                "records-incomplete",
                f"{folder}/records.jsonl holds {len(dense)} dense records, "
                f"its report counts {expected}",
                remedy="copy the bundle again, or build it again",
            )

        recipe = validate(Recipe, manifest.recipe, f"{folder}/racdeploy.json")
        return cls(folder, manifest, recipe, report, dense, pruned)

    @property
    def problems(self) -> list[Problem]:
        """Those that were asked, in order."""
        first = {record.prompt: record for record in self.dense}
        return [
            Problem(record.question, record.gold, task=record.task, scorer=record.scorer)
            for _, record in sorted(first.items())
        ]

    def check_model(self, manifest: Manifest) -> None:
        """Refuse answers of another dense model, naming the files."""
        ours = manifest.base.get("files", {})
        theirs = self.manifest.base.get("files", {})
        changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if changed or not ours:
            raise ArtifactError(
                "baseline-of-other-model",
                f"{self.folder} has the answers of another dense model, "
                f"{self.manifest.base.get('name')!r}: "
                f"{', '.join(changed) or 'it names no files'} differ",
                remedy="give a bundle of the same dense model with --baseline",
            )

    def check_artifact(self, path: Path) -> None:
        """Refuse a file that is not the dense artifact of this bundle's build, or none."""
        if not path.is_file():
            raise UsageError(
                "missing-baseline",
                f"{path} does not exist",
                remedy="give the dense artifact, or a bundle of the same dense model",
            )

        known = find_dense_arm(self.report).files.values()
        found = file_sha256(path)
        if found not in known:
            recorded = ", ".join(f"{sha256[:16]}…" for sha256 in known) or "none"
            raise ArtifactError(
                "not-the-dense-artifact",
                f"{path} is not the dense artifact of this bundle: "
                f"SHA-256 {found[:16]}…, recorded {recorded}",
                remedy="give the dense file that the build left below its --work folder, in "
                "export-*; `racdeploy export` writes the same one only where no importance chose "
                "the scales",
            )

    def answers(self, problems: Sequence[Problem], settings: Verification) -> tuple[Record, ...]:
        """Return the dense records of these problems, numbered by them."""
        self._check_decoding(settings)
        known = {(r.question, r.gold, r.sample): r for r in self.dense}

        found = []
        for index, problem in enumerate(problems):
            for sample in range(settings.samples):
                record = known.get((problem.question, problem.gold, sample))
                if record is not None:
                    found.append(record.model_copy(update={"prompt": index}))

        wanted = len(problems) * settings.samples
        if len(found) < wanted:
            raise UsageError(
                "missing-dense-answers",
                f"{wanted - len(found)} of {wanted} answers of the dense model "
                f"are not in {self.folder}",
                remedy="give the dense artifact with --baseline, a bundle with more prompts, "
                "or a smaller --tier",
            )

        return tuple(found)

    def _check_decoding(self, settings: Verification) -> None:
        changed = []
        for name in DECODING:
            built, asked = getattr(self.recipe.verify, name), getattr(settings, name)
            if built != asked:
                changed.append(f"{name} {built} and not {asked}")

        if changed:
            raise UsageError(
                "dense-settings-differ",
                f"the dense answers in {self.folder} were made with {', '.join(changed)}",
                remedy="give the dense artifact with --baseline, which answers again",
            )


def find_dense_arm(report: Report) -> ArmSummary:
    """Return the summary of the dense arm."""
    return next(arm for arm in report.arms if arm.name == "dense")


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints and may change answers, as ``A 1, now 2``."""
    # Older reports name kernels only where sparse ones ran.
    machines = {"kernels": STOCK, **recorded}, {"kernels": STOCK, **now}
    engines = recorded.get("engine", {}), now.get("engine", {})

    found = []
    for before, after in (machines, engines):
        for name in sorted({*before, *after} - _NO_MATTER):
            if before.get(name) != after.get(name):
                found.append(f"{name} {before.get(name)}, now {after.get(name)}")

    return found
