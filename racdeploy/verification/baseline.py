"""Recorded dense answers of a bundle, and the checks that allow comparing new answers with them."""

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
from racdeploy.recipe.section import MAX_PROMPTS
from racdeploy.report.files import read_records, read_report
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from racdeploy.tasks import Problem
from racdeploy.verification.answer_sampler import DECODING_SETTINGS, list_problems

# An engine's answers do not depend on these packages; engine settings are compared one by one.
_IGNORED_KEYS = frozenset({"engine", "torch", "transformers", "gguf", "python", "numpy"})


@dataclass(frozen=True)
class Baseline:
    """Bundle with its report and the records of both arms, in prompt order."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    report: Report
    dense: tuple[AnswerRecord, ...]
    pruned: tuple[AnswerRecord, ...]

    @classmethod
    def read(cls, folder: Path) -> Baseline:
        """Read a bundle's records.

        Raises:
            ArtifactError: records are missing, damaged or too few.
        """
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
        return cls(folder, manifest, recipe, report, dense=dense, pruned=pruned)

    @property
    def problems(self) -> list[Problem]:
        """Problems of the bundle's verification, in prompt order."""
        return list_problems(self.dense)

    @property
    def planned(self) -> int:
        """Prompts that the verification might have asked; it may have been clear earlier."""
        asked = len(self.problems)
        comparison = self.report.comparison
        planned = comparison.planned if comparison else None
        return min(max(asked, planned or 0), MAX_PROMPTS)

    def check_model(self, manifest: Manifest) -> None:
        """Refuse the answers of another dense model.

        Raises:
            ArtifactError: files of the two models differ, or none are recorded.
        """
        files = manifest.base.files
        own_files = self.manifest.base.files
        changed = sorted(
            name for name in {*files, *own_files} if files.get(name) != own_files.get(name)
        )
        if changed or not files:
            raise ArtifactError(
                "baseline-of-other-model",
                f"{self.folder} has the answers of another dense model, "
                f"{self.manifest.base.name!r}: "
                f"{', '.join(changed) or 'it names no files'} differ",
                remedy="give a bundle of the same dense model with --baseline",
            )

    def check_artifact(self, path: Path) -> None:
        """Refuse a file that is missing, or is not the dense artifact of this bundle's build."""
        if not path.is_file():
            raise UsageError(
                "missing-baseline",
                f"{path} does not exist",
                remedy="give the dense artifact, or a bundle of the same dense model",
            )

        known = self.report.dense_arm.files.values()
        actual = file_sha256(path)
        if actual not in known:
            recorded = ", ".join(f"{sha256[:16]}…" for sha256 in known) or "none"
            raise ArtifactError(
                "not-the-dense-artifact",
                f"{path} is not the dense artifact of this bundle: "
                f"SHA-256 {actual[:16]}…, recorded {recorded}",
                remedy="give the dense file that the build left below its --work folder, in "
                "export-*; `racdeploy export` writes the same one only where no importance chose "
                "the scales",
            )

    def answers(
        self, problems: Sequence[Problem], settings: Verification, remedy: str
    ) -> tuple[AnswerRecord, ...]:
        """Return the dense records of the problems, with ``prompt`` as the index of the problem.

        Args:
            remedy: ways to get answers that are missing.

        Raises:
            UsageError: the bundle was decoded with other settings, or lacks some answers.
        """
        self._check_decoding(settings)
        known = {(r.question, r.gold, r.sample): r for r in self.dense}

        # Matched by text: a smaller tier asks some of the bundle's problems, in another order.
        records = [
            record.model_copy(update={"prompt": index})
            for index, problem in enumerate(problems)
            for sample in range(settings.samples)
            if (record := known.get((problem.question, problem.gold, sample)))
        ]
        wanted = len(problems) * settings.samples
        if len(records) < wanted:
            raise UsageError(
                "missing-dense-answers",
                f"{wanted - len(records)} of {wanted} answers of the dense model "
                f"are not in {self.folder}",
                remedy=remedy,
            )

        return tuple(records)

    def _check_decoding(self, settings: Verification) -> None:
        built = self.recipe.verify
        changed = [
            f"{name} {getattr(built, name)}, not {getattr(settings, name)}"
            for name in DECODING_SETTINGS
            if getattr(built, name) != getattr(settings, name)
        ]
        if changed:
            raise UsageError(
                "dense-settings-differ",
                f"the dense answers in {self.folder} were made with {', '.join(changed)}",
                remedy="give the dense artifact with --baseline, which answers again",
            )


def compare_fingerprints(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two fingerprints that may change answers, as ``A 1, now 2``."""
    pairs = (recorded, now), (recorded.get("engine", {}), now.get("engine", {}))
    return [
        f"{name} {before.get(name)}, now {after.get(name)}"
        for before, after in pairs
        for name in sorted({*before, *after} - _IGNORED_KEYS)
        if before.get(name) != after.get(name)
    ]
