"""Jobs: recipes resolved on this machine, with model, tokenizer, problems, gate and formats."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from racdeploy import exporting, packing, quant
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.models.renumbering import OldIds, read_old_ids
from racdeploy.models.sources import ResolvedModel, resolve_model
from racdeploy.pipeline.shorten_stage import ShortenedModel
from racdeploy.pipeline.trace_memory import TraceMemory
from racdeploy.pipeline.vocabulary_choice import VocabularyChoice
from racdeploy.plugins import Names
from racdeploy.pruning.structure.layout import find_consumer
from racdeploy.quant import presets
from racdeploy.recipe import Recipe, Structure, Verification
from racdeploy.recipe.traces import FIRST_LIMIT, LEAST_TRACES
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_tag_names, find_tags
from racdeploy.targets import Target
from racdeploy.tasks import Problem, Split, TaskSet
from racdeploy.verification.gate import Gate, read_gate


@dataclass(frozen=True)
class Job:
    """A recipe resolved on this machine; each part is looked up on first use.

    Args:
        tier: tier of the gate that sets prompts and samples; empty takes the recipe's numbers.
        resolved: the dense model, if it was found before.
        notes: sentences on differences from the proposal of the target.
        shortened: the dense model that has learned to think less, which is then the one to prune.
        answer_limit: tokens of an answer, that the first answers have shown; 0 before that.
    """

    recipe: Recipe
    tier: str = ""
    resolved: ResolvedModel | None = None
    notes: tuple[str, ...] = ()
    shortened: ShortenedModel | None = None
    answer_limit: int = 0
    _prompt_tokens: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Tokens of the prompt of each question, counted once for all rungs of a plan."""

    @classmethod
    def at_tier(cls, recipe: Recipe, tier: str, prompts: int = 0) -> Job:
        """Return the job of a recipe, with the prompts and samples of a tier of its gate.

        ``prompts`` above 0 override the number of the tier.
        """
        gate = read_gate(built=recipe.gate).for_tier(tier)
        if not tier:
            return cls(recipe)

        settings = getattr(gate.tiers, tier).apply(recipe.verify, prompts)
        return cls(recipe.model_copy(update={"verify": settings}), tier)

    def with_recovery(self, **changed: Any) -> Job:
        """Return the job with other settings of recovery, of the same model."""
        recover = self.recipe.recover.model_copy(update=changed)
        return self.with_recipe(self.recipe.model_copy(update={"recover": recover}))

    def with_recipe(self, recipe: Recipe, notes: tuple[str, ...] | None = None) -> Job:
        """Return the job of another recipe for the same model and tasks, read only once."""
        notes = self.notes if notes is None else notes
        changed = replace(self, recipe=recipe, resolved=self.model, notes=notes)
        for name in ("checkpoint", "encoder", "tags", "tasks"):
            if name in vars(self):  # where cached_property keeps its values
                vars(changed)[name] = vars(self)[name]
        return changed

    @cached_property
    def siblings(self) -> tuple[Job, ...]:
        """Jobs for the other targets of the recipe, each on another engine."""
        recipes = map(self.recipe.for_target, self.recipe.also)
        _ = self.encoder  # a process, which they share
        jobs = tuple(map(self.with_recipe, recipes))
        names: dict[str, list[str]] = {}
        for job in (self, *jobs):
            names.setdefault(job.backend, []).append(job.recipe.target)

        for backend, same in names.items():
            if len(same) == 1:
                continue
            raise UsageError(
                "targets-share-engine",
                f"targets {' and '.join(same)} both run on {backend}: "
                "a bundle holds one artifact for each engine",
                remedy=f"leave --more-targets {same[-1]} out; another number format is another "
                "bundle: --quant NAME --out FOLDER",
            )

        return jobs

    @cached_property
    def gate(self) -> Gate:
        gate = read_gate(built=self.recipe.gate)
        return gate.for_tier(self.tier, len(self.problems("evaluation"))) if self.tier else gate

    @property
    def backend(self) -> str:
        return exporting.load(self.recipe.export.format).BACKEND

    @cached_property
    def model(self) -> ResolvedModel:
        return self.resolved or resolve_model(self.recipe.model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model to prune: the dense one, or its shortened form."""
        shortened = self.shortened and self.shortened.folder
        return Checkpoint(shortened or self.model.folder)

    @cached_property
    def encoder(self) -> PromptEncoder:
        return PromptEncoder.from_folder(self.model.folder)

    @cached_property
    def tags(self) -> ThinkingTags | None:
        return find_tags(self.encoder)

    @property
    def input_notes(self) -> tuple[str, ...]:
        """Sentences for the plan: notes of the job, the model and the tasks, and missing tags."""
        names = find_tag_names(self.encoder)
        source = self.encoder.template.source
        missing_tags = []
        if names and not any(tag in source for tag in names):
            missing_tags.append(
                f"the chat template does not write {names[0]}, though {names[0]} and {names[1]} "
                "are tokens: if the model does not think by itself, its thinking will be empty"
            )
        rounded = self._rounding[1]
        return (
            *self.notes,
            *self._note_context(),
            *self.checkpoint.notes,
            *self.tasks.notes,
            *missing_tags,
            *rounded,
        )

    def _note_context(self) -> list[str]:
        """Return a note where the model's context bounds that of the verification.

        A longer context in the recipe is refused by the checks before a build.
        """
        settings = self.recipe.verify
        positions = self.checkpoint.shape.max_positions
        if settings.context_tokens or settings.with_limits().context_tokens <= positions:
            return []
        return [f"the model was made for {positions:,} tokens, so it is verified with this context"]

    @cached_property
    def tasks(self) -> TaskSet:
        """The tasks of evaluation and of calibration."""
        return TaskSet.load(self.recipe.tasks, self.recipe.calibration_tasks)

    def predict_truncation(self, split: Split) -> list[str]:
        """Return a sentence for each task whose usual thinking is longer than its token limit."""
        verify = self.recipe.verify
        names = ("max_new_tokens", "context_tokens", "max_thinking_tokens")
        limits = {f"verify.{name}": getattr(verify, name) for name in names}
        tasks = self.tasks.evaluation
        if split == "calibration":
            limits = {"traces.max_new_tokens": self.recipe.traces.max_new_tokens}
            tasks = self.tasks.calibration

        # A limit that is not set, 0, follows the first answers.
        budgets = {name: limit for name, limit in limits.items() if limit}
        if not budgets:
            return []
        key = min(budgets, key=budgets.__getitem__)
        cuts = filter(None, (task.predict_truncation(budgets[key]) for task in tasks.values()))
        return [f"{cut}: raise {key}" for cut in cuts]

    @property
    def trace_limit(self) -> int:
        """Maximum tokens of a trace: the recipe's, or what is known so far."""
        return self.recipe.traces.max_new_tokens or self.answer_limit or FIRST_LIMIT

    @property
    def enough_trace_tokens(self) -> int:
        """Tokens of traces that are enough; 0 answers all prompts, as a training learns from."""
        recipe = self.recipe
        return 0 if recipe.recover.tokens else recipe.calibration.tokens_to_collect

    def expect_trace_prompts(self, answer_tokens: float) -> int:
        """Return how many prompts are answered if answers have so many tokens on average."""
        prompts = self.count_prompt_tokens("calibration")
        if not self.enough_trace_tokens:
            return len(prompts)

        batch = self.recipe.traces.batch_size
        needed = self.enough_trace_tokens / (fmean(prompts) + answer_tokens)
        shards = math.ceil(max(needed, LEAST_TRACES) / batch)
        return min(shards * batch, len(prompts))

    @cached_property
    def verification(self) -> Verification:
        """Settings of the verification, with limits that follow those of the traces.

        Where a longer context than usual was not asked for, fewer sequences are decoded together,
        so that they fit the memory that traces may take.
        """
        settings = self.recipe.verify
        if settings.max_new_tokens and settings.context_tokens:
            return settings

        positions = self.checkpoint.shape.max_positions
        usual = settings.with_limits(positions=positions)
        longest = max(self.count_prompt_tokens("evaluation"))
        fitted = settings.with_limits(self.trace_limit, longest, positions)
        if settings.context_tokens or fitted.context_tokens <= usual.context_tokens:
            return fitted

        memory = TraceMemory(self.checkpoint, longest, fitted.context_tokens, from_file=True)
        together = memory.fit_usual_sequences(fitted.parallel)
        return fitted.model_copy(update={"parallel": together})

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe with the limits of the verification, for the report and the bundle."""
        return self.recipe.model_copy(update={"verify": self.verification})

    @property
    def context_limit(self) -> int:
        """Tokens of the longest sequence that model and target have room for."""
        target = Target.read(self.recipe.target)
        return min(self.checkpoint.shape.max_positions, target.context_tokens)

    def problems(self, split: Split) -> list[Problem]:
        """Return the problems of a split: as many as the recipe asks for, or as a file has."""
        settings = self.recipe.traces if split == "calibration" else self.recipe.verify
        return self.tasks.draw(split, settings.seed, settings.count)

    def count_prompt_tokens(self, split: Split) -> list[int]:
        """Return the tokens of each prompt of a split."""
        lengths = self._prompt_tokens
        for question in {problem.question for problem in self.problems(split)} - lengths.keys():
            lengths[question] = len(self.encoder.encode(question))
        return [lengths[problem.question] for problem in self.problems(split)]

    @cached_property
    def vocabulary(self) -> VocabularyChoice | None:
        """The choice of the tokens that the pruned model keeps; None if it keeps all."""
        if not self.recipe.structure.cuts_vocabulary:
            return None

        problems = [*self.problems("calibration"), *self.problems("evaluation")]
        questions = tuple(problem.question for problem in problems)
        return VocabularyChoice(self.checkpoint, self.encoder, questions, self.recipe.structure)

    def find_old_ids(self, folder: Path) -> OldIds | None:
        """Return the dense ids of a pruned model's tokens; None if the vocabulary was not cut."""
        return read_old_ids(folder) if self.recipe.structure.cuts_vocabulary else None

    @cached_property
    def prunable_weights(self) -> Names:
        """Names of the dense model's weights that can be pruned, in forward order."""
        return self.checkpoint.shape.prunable_weights

    @cached_property
    def weights_to_prune(self) -> list[str]:
        """:attr:`prunable_weights` without those that ``prune.ignore`` leaves alone."""
        patterns = self.recipe.prune.ignore

        def stays_dense(name: str) -> bool:
            linear = name.removesuffix(".weight")
            return any(re.search(pattern, linear) for pattern in patterns)

        return [name for name in self.prunable_weights if not stays_dense(name)]

    @cached_property
    def structure(self) -> Structure:
        """The cut of the recipe, with feed-forward widths that fit the blocks of all formats."""
        structure = self.recipe.structure
        if structure.multiple or "F" not in structure.sizes:
            return structure

        # Only linears whose inputs are feed-forward channels get rows of the new width.
        end = f".{find_consumer(self.checkpoint.shape, 'F')}.weight"
        ends = [name for name in self.prunable_weights if name.endswith(end)]

        jobs = (self, *self.siblings)
        formats = {each for job in jobs for name in ends for each in job.quants_of(name)}
        blocks = [quant.load(name).block_size for name in formats]
        multiple = max([structure.width_multiple, *blocks])
        return structure.model_copy(update={"multiple": multiple})

    @cached_property
    def quant_rules(self) -> presets.QuantRules:
        return presets.read(self.recipe.export.quant, self.recipe.export.tensors)

    @property
    def reference_quant(self) -> str:
        """Number format of the dense model to compare with: 8 bits, or a wider artifact's own."""
        reference = exporting.load(self.recipe.export.format).COMMON_QUANTS[0]
        own = self.quant_rules
        is_wider = quant.load(own.quant).bits >= quant.load(reference).bits
        return own.name if is_wider else reference

    def quants_of(self, weight: str) -> Names:
        """Return the number formats of a prunable weight, given its name in the checkpoint.

        Usually one; several if the file stores the weight in equal parts.
        """
        return choose_quants(self.checkpoint, weight, self.quant_rules)

    @property
    def rounding_quants(self) -> Mapping[str, str]:
        """Linear → number format whose codes pruning chooses; the export rounds the others.

        Raises:
            UsageError: the recipe asks for optimized rounding, and a linear cannot have it.
        """
        return self._rounding[0]

    @cached_property
    def _rounding(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """:attr:`rounding_quants`, and a note on linears that are rounded to nearest instead."""
        rounding = self.recipe.export.rounding
        chosen: dict[str, str] = {}
        errors = []
        if rounding == "nearest":
            return chosen, ()

        for weight in self.weights_to_prune:
            linear = weight.removesuffix(".weight")
            names = sorted({*self.quants_of(weight)})
            if len(names) > 1:
                errors.append(_refuse_several_quants(linear, names))
            elif quant.has_grid(names[0]):
                chosen[linear] = names[0]
            elif rounding:
                supported = packing.list_supported(self.recipe.export.format, "quant")
                errors.append(_refuse_without_codes(linear, names[0], supported))

        formats = sorted({*chosen.values()})
        if len(formats) > 1 and "L" in self.structure.sizes:
            # Rules for blocks count those of the file, which are known after pruning.
            error = UsageError(
                "codes-need-all-blocks",
                f"optimized rounding to several formats ({', '.join(formats)}) needs all blocks",
                remedy="one number format for all linears, or leave out --keep blocks",
            )
            errors.append(error)
            chosen = {}

        if rounding and errors:
            raise errors[0]
        notes = [f"rounded to nearest instead: {error.message}" for error in errors[:1]]
        return chosen, tuple(notes)


def _refuse_several_quants(linear: str, names: Sequence[str]) -> UsageError:
    return UsageError(
        "codes-need-one-quant",
        f"optimized rounding needs one number format for {linear}, and its parts have "
        f"{', '.join(names)}",
        remedy="give them the same in export.tensors, or export.rounding = 'nearest'",
    )


def _refuse_without_codes(linear: str, name: str, supported: Iterable[str]) -> UsageError:
    usable = [other for other in supported if quant.has_grid(other)]
    return UsageError(
        "no-optimized-rounding",
        f"{linear} is stored as {name}, which has no codes to choose",
        remedy=f"use one of {', '.join(usable)} if its blocks divide the rows, name the"
        " linear in prune.ignore, or export.rounding = 'nearest'",
    )


def choose_quants(checkpoint: Checkpoint, weight: str, rules: presets.QuantRules) -> Names:
    """Return the number formats of a prunable weight's parts in a file, usually one."""
    family = checkpoint.family
    block, linear = family.split_block(weight)
    stored = [f"blk.{block}.{name}" for name in family.list_gguf_names(generalize_expert(linear))]
    blocks, tied = checkpoint.shape.block_count, checkpoint.tied
    row_length = checkpoint.entries[weight].shape[-1]
    requested = [rules.choose(name, blocks, tied).quant for name in stored]
    return tuple(rules.fit_rows(name, row_length)[0] for name in requested)
