"""A finished bundle, read once: what it recorded, the gate that judges it, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.manifest import TokenizerEntry
from racdeploy.recipe import Verification
from racdeploy.runtime.loading import check_beside
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import tags_of
from racdeploy.tasks import Problem, TaskSet
from racdeploy.verify.answers import Respondent
from racdeploy.verify.baseline import Baseline
from racdeploy.verify.gate import Gate, read_gate


@dataclass(frozen=True)
class Bundle:
    """A bundle, the limits that go over its own, and a tier; empty asks what the build asked."""

    folder: Path
    gate_file: Path | None = None
    tier: str = ""

    @cached_property
    def own(self) -> Baseline:
        """The bundle with its records, its files checked."""
        found = Baseline.read(self.folder)
        check_beside(self.folder, found.manifest, found.manifest.artifacts[0])
        return found

    @cached_property
    def gate(self) -> Gate:
        """The limits of the file over those of the bundle, for the tier."""
        # A wrong file or tier is reported before the bundle is read.
        read_gate(self.gate_file).at(self.tier)
        return read_gate(self.gate_file, self.own.recipe.gate).at(self.tier)

    @cached_property
    def settings(self) -> Verification:
        """How prompts are answered; logits need the checkpoints and torch."""
        settings = self.own.recipe.verify
        if self.tier:
            settings = getattr(self.gate.tiers, self.tier).apply(settings)
        return settings.model_copy(update={"logit_traces": 0})

    @cached_property
    def problems(self) -> list[Problem]:
        """A part of what the build asked, or all of it and its tasks' further problems."""
        recorded = self.own.problems
        if not self.tier:
            return recorded
        if self.settings.count <= len(recorded):
            return recorded[: self.settings.count]

        recipe = self.own.recipe
        tasks = TaskSet.load(recipe.tasks, recipe.calibration_tasks)
        drawn = tasks.draw("evaluation", self.settings.seed, self.settings.count)
        for ours, theirs in zip(drawn, recorded, strict=False):
            if (ours.question, ours.gold) != (theirs.question, theirs.gold):
                raise UsageError(
                    "problems-changed",
                    "the tasks no longer give the problems that the bundle was built with",
                    remedy=f"use the same files, or a tier of at most {len(recorded)} prompts, "
                    f"which are in the bundle: --gate with tiers.{self.tier}.prompts",
                )

        return drawn

    def respondent(self, progress: Progress | None) -> Respondent:
        """Return who asks the pruned model, its thinking under control as it ships."""
        generation = self.own.manifest.generation
        respondent = self.free_respondent(progress)
        budget = generation.max_thinking_tokens or 0
        settings = self.settings.model_copy(update={"max_thinking_tokens": budget})
        return replace(respondent, settings=settings, control=generation.thinking)

    def free_respondent(self, progress: Progress | None) -> Respondent:
        """Return who asks the pruned model where nobody here can control its thinking."""
        return self._make_respondent(self.own.manifest.tokenizer, progress)

    def dense_respondent(self, progress: Progress | None) -> Respondent:
        """Return who asks the dense model, which may have more tokens."""
        manifest = self.own.manifest
        return self._make_respondent(manifest.dense_tokenizer or manifest.tokenizer, progress)

    def _make_respondent(self, tokenizer: TokenizerEntry, progress: Progress | None) -> Respondent:
        encoder = PromptEncoder.from_folder(self.folder / tokenizer.place)
        tags = None
        if tokenizer.open_tag and tokenizer.close_tag:
            tags = tags_of(encoder, tokenizer.open_tag, tokenizer.close_tag)
        return Respondent(encoder, tags, tokenizer.eos_ids, self.settings, progress)
