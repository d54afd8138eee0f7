"""A finished bundle for verification: its records, its gate and its problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from racdeploy.bundles.bench import find_dense_in_work
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.errors import ArtifactError, GateError, UsageError
from racdeploy.files.sha256_cache import FileState, refuse_changed, take_states
from racdeploy.manifest import MANIFEST_NAME
from racdeploy.recipe import Verification
from racdeploy.runtime.deployed import DeployedModel, open_bundle
from racdeploy.runtime.loading import check_companion_files
from racdeploy.sparse_kernels import STOCK, AccelMode, kernels_used
from racdeploy.tasks import Problem, TaskSet
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.baseline import Baseline
from racdeploy.verification.examiner import Examiner, ServerOptions
from racdeploy.verification.gate import Gate, read_gate


@dataclass(frozen=True)
class BundleToVerify:
    """A bundle, a gate file that overrides its own limits, and a tier.

    Without a tier the bundle's own problems are asked again.

    Args:
        tasks: tasks of the bundle's recipe that may read files or the Hub.
        work: folder for the answers.
        threads: 0 uses every core.
        accel: kernels for sparse weights.
        server: how a server is asked in place of the artifact.
    """

    folder: Path
    gate_file: Gate | Path | None
    tier: str
    tasks: Sequence[str] = ()
    work: Path = Path()
    threads: int = 0
    accel: AccelMode = "auto"
    progress: Progress | None = None
    server: ServerOptions = field(default_factory=ServerOptions)
    _states: dict[str, FileState] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        # Before anything is checked or used, so that any later change is detected.
        is_bundle = (self.folder / MANIFEST_NAME).is_file()  # no other folder is walked through
        files = [path for path in self.folder.rglob("*") if path.is_file()] if is_bundle else []
        names = [file.relative_to(self.folder).as_posix() for file in files]
        self._states.update(take_states(self.folder, names))

    def refuse_changes(self) -> None:
        """Raise ArtifactError if a listed file has changed since then."""
        for files in self.contents.manifest.listed:
            refuse_changed(self.folder, files, self._states)

    @cached_property
    def contents(self) -> Baseline:
        """Manifest, recipe, report and records of the bundle; its files are checked first."""
        baseline = Baseline.read(self.folder)
        check_companion_files(self.folder, baseline.manifest, baseline.manifest.artifacts[0])
        return baseline

    @cached_property
    def gate(self) -> Gate:
        """Limits of the gate file merged over the bundle's, for the tier."""
        # Report a wrong file or tier before the bundle is read, which takes longer.
        read_gate(self.gate_file).for_tier(self.tier)
        return read_gate(self.gate_file, self.contents.recipe.gate).for_tier(self.tier)

    @cached_property
    def settings(self) -> Verification:
        """Settings of the verification, without logits: these need both checkpoints and torch."""
        settings = self.contents.recipe.verify
        if self.tier:
            settings = getattr(self.gate.tiers, self.tier).apply(settings)
        return settings.model_copy(update={"logit_traces": 0})

    @cached_property
    def problems(self) -> list[Problem]:
        """Problems to ask: the recorded ones, fewer, or more drawn from the same tasks."""
        recorded = self.contents.problems
        # A build that was clear early has recorded the first of its prompts.
        if not self.tier or self.settings.count == self.contents.planned:
            return recorded
        if self.settings.count <= len(recorded):
            return recorded[: self.settings.count]

        recipe = self.contents.recipe
        smaller = (
            f"a tier of at most {len(recorded)} prompts, which are in the bundle: --gate with "
            f"tiers.{self.tier}.prompts"
        )
        # A stranger may have written the recipe: only the user names files to read.
        reading = {spec for spec in (*recipe.tasks, *recipe.calibration_tasks) if ":" in spec}
        if unnamed := ", ".join(sorted(reading.difference(self.tasks))):
            raise UsageError(
                "tasks-not-named",
                f"{self.settings.count} prompts are asked for, the bundle has {len(recorded)}, and "
                f"its recipe would draw more from {unnamed:.200}",
                remedy=f"add --tasks with each of these if you trust it; or use {smaller}",
            )

        tasks = TaskSet.load(recipe.tasks, recipe.calibration_tasks)
        drawn = tasks.draw("evaluation", self.settings.seed, self.settings.count)
        # The files of the tasks may have changed: recorded answers would belong to other problems.
        for problem, record in zip(drawn, recorded, strict=False):
            if (problem.question, problem.gold) != (record.question, record.gold):
                raise UsageError(
                    "problems-changed",
                    "the tasks no longer draw the problems that the bundle was built with",
                    remedy=f"use the same files, or {smaller}",
                )

        return drawn

    @cached_property
    def examiner(self) -> Examiner:
        """Asks the bundle's problems."""
        # Kernels that will not be used are off, so that the report names no missing package.
        unused = self.accel == "auto" and kernels_used("auto", self.threads) == STOCK
        settings, accel = self.settings, "off" if unused else self.accel
        return Examiner(
            self.problems,
            settings,
            self.gate,
            AnswerCache(self.work, repeats_finished=True, keeps=False),
            engine=EngineSettings(
                settings.context_tokens, settings.parallel, self.threads, accel=accel
            ),
            progress=self.progress,
            server=self.server,
            planned=self.planned,
        )

    @property
    def planned(self) -> int:
        """Prompts of which the build has asked the first until it was clear; 0 if it asked all."""
        planned = self.contents.planned
        if planned <= len(self.problems):
            return 0

        has_other_plan = self.tier and self.settings.count != planned
        return 0 if has_other_plan else planned

    @cached_property
    def model(self) -> DeployedModel:
        """The first artifact with the bundle's tokenizer, template and thinking control."""
        return open_bundle(self.folder, self.contents.manifest)

    def find_dense(self) -> Path | None:
        """Return the path of the dense artifact in the work folder, if it is there."""
        return find_dense_in_work(self.work, self.contents.report.dense_arm.files)

    def open_dense(self, path: Path) -> DeployedModel:
        """Return the dense model in a file, without control; its vocabulary may be larger."""
        recorded = self.contents.report.dense_arm
        known = {
            "path": path.name,
            "files": recorded.files,
            "size_bytes": recorded.size_bytes or 0,
            "quant": recorded.quant or "",
        }
        entry = self.model.entry.model_copy(update=known)
        model = open_bundle(self.folder, self.contents.manifest.of_dense_model())
        return replace(model, settings=replace(model.settings, artifact=entry), path=path)

    def check_integrity(self) -> None:
        """Raise GateError for a changed artifact: its answers would be those of another model."""
        for entry in self.contents.manifest.artifacts:
            try:
                entry.check_changed_files(self.folder)
            except ArtifactError as error:
                raise GateError(
                    error.code,
                    f"integrity failed, so no question was asked: {error.message}",
                    remedy=error.remedy,
                ) from error
