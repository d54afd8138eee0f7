"""One recipe, resolved on this machine: its model, tokenizer, problems, gate and number formats."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy import export, quant
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize
from racdeploy.models.renumbering import read_old_ids
from racdeploy.models.sources import ResolvedModel, resolve
from racdeploy.pipeline.vocabulary_choice import VocabularyChoice
from racdeploy.prune.structure.layout import find_end
from racdeploy.quant import Codes, presets
from racdeploy.recipe import Recipe, Structure, Verification
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_tag_names, find_tags
from racdeploy.tasks import Problem, Split, TaskSet
from racdeploy.verify.gate import Gate, read_gate


@dataclass(frozen=True)
class Job:
    """What a recipe means on this machine; each part is looked up when it is first asked for.

    Without a ``tier``, what the recipe says; ``resolved`` is the dense model where found before,
    ``notes`` say where the job differs from what its target proposes.
    """

    recipe: Recipe
    tier: str = ""
    resolved: ResolvedModel | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def at_tier(cls, recipe: Recipe, tier: str, prompts: int = 0) -> Job:
        """Return the job of a recipe, with the prompts and samples of a tier of its gate.

        As many ``prompts`` as a user asks for beside the tier win over the tier's.
        """
        gate = read_gate(built=recipe.gate).at(tier)
        if not tier:
            return cls(recipe)

        settings = getattr(gate.tiers, tier).apply(recipe.verify, prompts)
        return cls(recipe.model_copy(update={"verify": settings}), tier)

    def unrecovered(self) -> Job:
        """Return the job without recovery, of the same model."""
        recipe = self.recipe
        if not recipe.recover.tokens:
            return self

        off = recipe.recover.model_copy(update={"tokens": 0})
        return replace(self, recipe=recipe.model_copy(update={"recover": off}), resolved=self.model)

    def changed(self, recipe: Recipe) -> Job:
        """Return the job of another recipe for the same model, read once."""
        changed = replace(self, recipe=recipe, resolved=self.model)
        known = {name: getattr(self, name) for name in ("checkpoint", "encoder", "tags", "tasks")}
        vars(changed).update(known)  # as cached_property keeps them
        return changed

    @cached_property
    def siblings(self) -> tuple[Job, ...]:
        """The same job for each of the recipe's further targets, each for another engine."""
        jobs = tuple(replace(self, recipe=self.recipe.at(name)) for name in self.recipe.also)
        backends = [job.backend for job in (self, *jobs)]

        if len(set(backends)) < len(backends):
            twice = next(name for name in backends if backends.count(name) > 1)
            names = (self.recipe.target, *self.recipe.also)
            same = [name for name, backend in zip(names, backends, strict=True) if backend == twice]
            raise UsageError(
                "targets-share-engine",
                f"targets {' and '.join(same)} both run on {twice}: "
                "a bundle holds one artifact for each engine",
                remedy=f"leave --also {same[-1]} out; another number format is another bundle: "
                "--quant NAME --out FOLDER",
            )

        return jobs

    @cached_property
    def gate(self) -> Gate:
        gate = read_gate(built=self.recipe.gate)
        return gate.at(self.tier, len(self.problems("evaluation"))) if self.tier else gate

    @property
    def backend(self) -> str:
        return export.load(self.recipe.export.format).BACKEND

    @cached_property
    def model(self) -> ResolvedModel:
        return self.resolved or resolve(self.recipe.model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model.folder)

    @cached_property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder.from_folder(self.model.folder)

    @cached_property
    def tags(self) -> ThinkingTags | None:
        return find_tags(self.encoder)

    @property
    def hints(self) -> tuple[str, ...]:
        """What a plan should say of the inputs: sentences on tasks, tags and notes of the job."""
        names = find_tag_names(self.encoder)
        source = self.encoder.template.source
        told = []
        if names and not any(tag in source for tag in names):
            told.append(
                f"the chat template does not write {names[0]}, though {names[0]} and {names[1]} "
                "are tokens: if the model does not think by itself, its thinking will be empty"
            )
        return (*self.notes, *self.checkpoint.notes, *self.tasks.notes, *told)

    @cached_property
    def tasks(self) -> TaskSet:
        """What the model is asked, when it is verified and when traces are collected."""
        return TaskSet.load(self.recipe.tasks, self.recipe.calibration_tasks)

    def foresee_cuts(self, split: Split) -> list[str]:
        """Return a sentence for each task whose thoughts are usually longer than they may be."""
        verify = self.recipe.verify
        budgets = {
            "verify.max_new_tokens": verify.max_new_tokens,
            "verify.context_tokens": verify.context_tokens,
            "verify.max_thinking_tokens": verify.max_thinking_tokens or verify.context_tokens,
        }
        asked = self.tasks.evaluation
        if split == "calibration":
            budgets = {"traces.max_new_tokens": self.recipe.traces.max_new_tokens}
            asked = self.tasks.calibration

        key = min(budgets, key=lambda name: budgets[name])
        cuts = filter(None, (task.foresee_cut(budgets[key]) for task in asked.values()))
        return [f"{cut}: raise {key}" for cut in cuts]

    def problems(self, split: Split) -> list[Problem]:
        """Return the problems of a split: as many as the recipe asks for, or as a file holds."""
        settings = self.recipe.traces if split == "calibration" else self.recipe.verify
        return self.tasks.draw(split, settings.seed, settings.count)

    @cached_property
    def vocabulary(self) -> VocabularyChoice | None:
        """Which tokens the pruned model keeps; None where it keeps all."""
        if not self.recipe.structure.cuts_vocabulary:
            return None

        asked = [*self.problems("calibration"), *self.problems("evaluation")]
        questions = tuple(problem.question for problem in asked)
        return VocabularyChoice(self.checkpoint, self.encoder, questions, self.recipe.structure)

    def renumbering(self, folder: Path) -> NDArray[np.int64] | None:
        """Return the dense id of each token of a pruned model's folder; None where all stay."""
        return read_old_ids(folder) if self.recipe.structure.cuts_vocabulary else None

    @cached_property
    def prunable_weights(self) -> tuple[str, ...]:
        """Names of the dense model's weights that can be pruned, in forward order."""
        return self.checkpoint.shape.linear_weights

    @cached_property
    def weights_to_prune(self) -> list[str]:
        """:attr:`prunable_weights` without those that ``prune.dense`` leaves alone."""
        patterns = self.recipe.prune.dense

        def stays_dense(name: str) -> bool:
            linear = name.removesuffix(".weight")
            return any(re.search(pattern, linear) for pattern in patterns)

        return [name for name in self.prunable_weights if not stays_dense(name)]

    @cached_property
    def structure(self) -> Structure:
        """What is cut, in widths that the number formats of all targets have blocks for."""
        structure = self.recipe.structure
        if structure.multiple or "F" not in structure.sizes:
            return structure

        # Weights whose rows are as long as the feed-forward part is wide.
        end = f".{find_end(self.checkpoint.shape, 'F')}.weight"
        ends = [name for name in self.prunable_weights if name.endswith(end)]

        jobs = (self, *self.siblings)
        formats = {each for job in jobs for name in ends for each in job.quants_of(name)}
        blocks = [quant.load(name).BLOCK for name in formats]
        multiple = max([structure.width_multiple, *blocks])
        return structure.model_copy(update={"multiple": multiple})

    @cached_property
    def quant_rules(self) -> presets.Mix:
        return presets.read(self.recipe.export.quant, self.recipe.export.tensors)

    def quants_of(self, weight: str) -> tuple[str, ...]:
        """Return the number formats of a prunable weight, given its name in the checkpoint.

        There are several where the file has it in as many equal parts.
        """
        return choose_quants(self.checkpoint, weight, self.quant_rules)

    @property
    def joint_quant(self) -> Codes:
        """The format whose codes are chosen while pruning, or linear → one; empty: none are.

        Raises:
            UsageError: one has no grid, or does not fit the rows of a linear.
        """
        if not self.recipe.prune.joint:
            return ""
        chosen = {}

        for weight in self.weights_to_prune:
            linear = weight.removesuffix(".weight")
            name, *others = dict.fromkeys(self.quants_of(weight))
            if others:
                raise UsageError(
                    "codes-need-one-quant",
                    f"prune.joint needs one number format for {linear}, "
                    f"{self.quant_rules.name} gives its parts {', '.join((name, *others))}",
                    remedy="give them the same in export.tensors, or prune.joint = false",
                )

            if why := quant.fits(quant.as_grid(name), self.checkpoint.entries[weight].shape[1]):
                raise UsageError(
                    "quant-does-not-fit",
                    f"prune.joint with quant {name!r}: {weight}: {why}",
                    remedy="name the linear in prune.dense, or prune.joint = false",
                )

            chosen[linear] = name

        names = sorted({*chosen.values()})
        if len(names) == 1:
            return names[0]

        if "L" in self.structure.sizes:  # the file numbers those that stay
            raise UsageError(
                "codes-need-all-blocks",
                f"prune.joint with {', '.join(names)} needs every block where it is",
                remedy="one number format for all linears, or leave out --keep blocks",
            )
        return chosen


def choose_quants(checkpoint: Checkpoint, weight: str, rules: presets.Mix) -> tuple[str, ...]:
    """Return the number formats that the parts of a prunable weight get in a file, mostly one."""
    family = checkpoint.family
    block, linear = family.split_block(weight)
    stored = [f"blk.{block}.{name}" for name in family.list_stored(generalize(linear))]
    blocks, tied = checkpoint.shape.block_count, checkpoint.tied
    return tuple(rules.choose(name, blocks, tied).quant for name in stored)


def fit_context(job: Job) -> Job:
    """Return the job with no more context than its model has, where the recipe names none.

    The job's notes say so; a recipe that asks for more is refused before any work.
    """
    settings = job.recipe.verify
    positions = job.checkpoint.shape.positions
    default = Verification.model_fields["context_tokens"].default
    if settings.context_tokens != default or default <= positions:
        return job

    fitted = settings.model_copy(update={"context_tokens": positions})
    recipe = job.recipe.model_copy(update={"verify": fitted})
    note = f"the model is made for {positions:,} tokens, and is verified with as many"
    return replace(job, recipe=recipe, resolved=job.model, notes=(*job.notes, note))
