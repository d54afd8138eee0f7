"""A finished bundle for verification: its records, its gate and its problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.files.sha256_cache import FileState, refuse_changed, take_states
from racdeploy.manifest import MANIFEST_NAME, TokenizerEntry
from racdeploy.recipe import Verification
from racdeploy.runtime.loading import check_companion_files
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import encode_tags
from racdeploy.tasks import Problem, TaskSet
from racdeploy.verification.answer_sampler import AnswerSampler
from racdeploy.verification.baseline import Baseline
from racdeploy.verification.gate import Gate, read_gate


@dataclass(frozen=True)
class BundleToVerify:
    """A bundle, a gate file that overrides its own limits, and a tier.

    Without a tier the bundle's own problems are asked again. ``tasks`` are those of the bundle's
    recipe that may read files or the Hub.
    """

    folder: Path
    gate_file: Path | None
    tier: str
    tasks: Sequence[str] = ()
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
        if not self.tier:
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
                remedy=f"add --task with each of these if you trust it; or use {smaller}",
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

    def make_sampler(self, progress: Progress | None) -> AnswerSampler:
        """Return an answer sampler for the pruned model, with its thinking control and budget."""
        generation = self.contents.manifest.generation
        sampler = self.make_uncontrolled_sampler(progress)
        budget = generation.max_thinking_tokens or 0
        settings = self.settings.model_copy(update={"max_thinking_tokens": budget})
        return replace(sampler, settings=settings, control=generation.thinking)

    def make_uncontrolled_sampler(self, progress: Progress | None) -> AnswerSampler:
        """Return an answer sampler for the pruned model without thinking control."""
        return self._make_sampler(self.contents.manifest.tokenizer, progress)

    def make_dense_sampler(self, progress: Progress | None) -> AnswerSampler:
        """Return an answer sampler for the dense model, whose vocabulary may be larger."""
        manifest = self.contents.manifest
        return self._make_sampler(manifest.dense_tokenizer or manifest.tokenizer, progress)

    def _make_sampler(self, tokenizer: TokenizerEntry, progress: Progress | None) -> AnswerSampler:
        encoder = PromptEncoder.from_folder(self.folder / tokenizer.folder)
        tags = None
        if tokenizer.open_tag and tokenizer.close_tag:
            tags = encode_tags(encoder, tokenizer.open_tag, tokenizer.close_tag)
        return AnswerSampler(encoder, tags, tokenizer.eos_ids, self.settings, progress)
