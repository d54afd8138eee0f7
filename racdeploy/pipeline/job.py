"""One recipe, resolved: its model, tokenizer, tasks and problems, and the check before any work."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy import export, quant, tasks
from racdeploy.errors import MissingExtraError, ModelError, UsageError
from racdeploy.export import ExportResult
from racdeploy.extras import is_installed
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered, listed
from racdeploy.models.sources import ResolvedModel, resolve
from racdeploy.pipeline import bundling
from racdeploy.quant import presets
from racdeploy.recipe import Recipe, Target
from racdeploy.report.model import LinearRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_tags
from racdeploy.verify.controls import SAME_SIZE
from racdeploy.verify.gate import Gate, read_gate
from racdeploy.verify.plan import Expectation, plan

_NEEDS = {"torch": "prune", "transformers": "prune", "safetensors": "prune"}


_LABELS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3))
_SIZE = re.compile(
    r"(?:^|-)(?:\d+x)?\d+(?:\.\d+)?[KMBT](?=-|$)", re.IGNORECASE
)  # as 135M, 1.5B or 8x7B


@dataclass(frozen=True)
class Job:
    """What a recipe means on this machine.

    Args:
        recipe: what to do.
        tier: of the gate; empty runs what the recipe says.
    """

    recipe: Recipe
    tier: str = ""

    @classmethod
    def of(cls, recipe: Recipe, tier: str) -> Job:
        """Return the job of a recipe, with the prompts and samples of a tier of its gate; "" changes nothing.

        Raises:
            UsageError: an unknown tier, or a bad gate.
        """
        gate = read_gate(built=recipe.gate).at(tier)
        if not tier:
            return cls(recipe)
        settings = getattr(gate.tiers, tier).apply(recipe.verify)
        return cls(recipe.model_copy(update={"verify": settings}), tier)

    @cached_property
    def gate(self) -> Gate:
        """Limits of the checks."""
        return read_gate(built=self.recipe.gate).at(self.tier)

    @cached_property
    def model(self) -> ResolvedModel:
        """The dense model's folder."""
        return resolve(self.recipe.model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The dense model, opened."""
        return Checkpoint(self.model.folder)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Template and tokenizer of the dense model."""
        return PromptEncoder.from_folder(self.model.folder)

    @cached_property
    def tags(self) -> ThinkingTags | None:
        """Thinking tags, or None for a model that does not think."""
        return find_tags(self.encoder)

    @cached_property
    def tasks_by_spec(self) -> dict[str, tasks.Task]:
        """Evaluation and calibration tasks by specification."""
        for specs in (self.evaluation_specs, self.calibration_specs):
            if len(set(specs)) < len(specs):
                raise UsageError(
                    f"a task is named twice: {', '.join(specs)}", remedy="name each task once"
                )
        chosen = self.evaluation_specs + self.calibration_specs
        return {spec: tasks.load(spec) for spec in dict.fromkeys(chosen)}

    @property
    def evaluation_specs(self) -> tuple[str, ...]:
        """What is asked when the model is verified; by default every procedural task."""
        return self.recipe.tasks or tasks.procedural_names()

    @property
    def calibration_specs(self) -> tuple[str, ...]:
        """What is asked when traces are collected."""
        return self.recipe.calibration_tasks or self.evaluation_specs

    @cached_property
    def siblings(self) -> tuple[Job, ...]:
        """The same job for each of the recipe's further targets, each for an engine of its own.

        Raises:
            UsageError: two targets are for one engine.
        """
        jobs = tuple(Job(self.recipe.at(name), self.tier) for name in self.recipe.also)
        backends = [job.backend for job in (self, *jobs)]
        if len(set(backends)) < len(backends):
            raise UsageError(
                f"targets {', '.join((self.recipe.target, *self.recipe.also))} run on {', '.join(backends)}: "
                "a bundle holds one artifact for each engine",
                remedy="leave one of them out; build a second bundle for another number format",
            )
        return jobs

    @property
    def backend(self) -> str:
        """The engine that runs the artifact."""
        return export.load(self.recipe.export.format).BACKEND

    def check(self, out: Path | None = None) -> dict[str, Any]:
        """Look at everything that can be known before a build, and return the plan.

        Args:
            out: where the bundle will go; None is a folder named as the artifact, which may be of any step of a
                schedule.

        Raises:
            RacdeployError: the first thing that would go wrong later.
        """
        recipe = self.recipe
        for job in (self, *self.siblings):
            _require({**_NEEDS, **export.load(job.recipe.export.format).NEEDS})
        export.check(recipe.export)
        ends = recipe.prune.schedule or (recipe.prune.sparsity,)
        for place in (
            [out] if out else [Path(self.reaching(sparsity).artifact_name) for sparsity in ends]
        ):
            bundling.check_replaceable(place)
        for name in recipe.verify.controls:
            if name != SAME_SIZE:
                export.check(
                    recipe.export.model_copy(
                        update={"quant": name, "tensors": {}, "packing": "plain"}
                    )
                )
        self.check_model()
        longest = max(
            len(self.encoder.encode(problem.question)) for problem in self.problems("evaluation")
        )
        if longest + recipe.verify.max_new_tokens > recipe.verify.context_tokens:
            raise UsageError(
                f"the longest prompt has {longest} tokens; with verify.max_new_tokens {recipe.verify.max_new_tokens} "
                f"that is more than verify.context_tokens {recipe.verify.context_tokens}",
                remedy="raise verify.context_tokens or lower verify.max_new_tokens",
            )
        plan = self._plan()
        self._check_memory(plan)
        for sibling in self.siblings:
            export.check(sibling.recipe.export)
            sibling._check_memory(sibling._plan())
        return plan

    def _check_memory(self, plan: Mapping[str, Any]) -> None:
        target = Target.read(self.recipe.target)
        if plan["artifact_bytes"] + plan["cache_bytes"] > target.memory_limit_bytes:
            raise UsageError(
                f"the artifact takes {plan['artifact_bytes'] / 1e9:.2f} GB and the cache of one sequence "
                f"{plan['cache_bytes'] / 1e9:.2f} GB, target {target.name!r} holds "
                f"{target.memory_limit_bytes / 1e9:.2f} GB",
                remedy="choose a smaller quant, a smaller model, a shorter context, or another target",
            )

    def check_model(self) -> None:
        """Look at what traces and pruning need: the model's parts, the pattern, and the problems.

        Raises:
            RacdeployError: the first thing that would go wrong later.
        """
        _require(_NEEDS)
        settings, entries, _ = self.recipe.prune, self.checkpoint.entries, self.gate
        check_covered(self.checkpoint, settings.dense)
        if missing := [name for name in self.prunable() if name not in entries]:
            raise ModelError(
                f"{self.checkpoint.folder} lacks {len(missing)} linears of its architecture: {listed(missing)}",
                remedy="the checkpoint is incomplete; save or download it again",
            )
        self._check_dense()
        if settings.joint:
            _ = self.grid
        for name in self.pruned():
            _check_pattern(name, entries[name].shape[1], settings.kept_of)
        _ = self.checkpoint.eos_ids, self.encoder.encode("2 + 2?"), self.checkpoint.tied
        asked = {problem.question for problem in self.problems("evaluation")}
        if shared := asked & {problem.question for problem in self.problems("calibration")}:
            raise UsageError(
                f"{len(shared)} questions are in both the calibration and the evaluation task",
                remedy="give one file alone, which is split, or two files that share no question",
            )

    def _check_dense(self) -> None:
        """Refuse patterns of ``prune.dense`` that name no linear, or together name every one."""
        linears = [
            n.removesuffix(".weight")
            for n, entry in self.checkpoint.entries.items()
            if len(entry.shape) > 1
        ]
        for pattern in self.recipe.prune.dense:
            if not any(re.search(pattern, name) for name in linears):
                raise UsageError(
                    f"prune.dense pattern {pattern!r} matches no linear",
                    remedy=f"names look like {self.prunable()[0].removesuffix('.weight')}",
                )
        if not self.pruned():
            raise UsageError(
                f"prune.dense leaves nothing to prune: it matches all {len(self.prunable())} linears",
                remedy=f"name fewer of {listed(name.removesuffix('.weight') for name in self.prunable())}",
            )

    def problems(self, split: tasks.Split) -> list[tasks.Problem]:
        """Return the problems of a split: as many as the recipe asks for, or as a short file holds.

        Raises:
            UsageError: there is none.
        """
        calibrating = split == "calibration"
        specs = self.calibration_specs if calibrating else self.evaluation_specs
        settings = self.recipe.traces if calibrating else self.recipe.verify
        return self.draw(split, specs, settings.seed, settings.count)

    def draw(
        self, split: tasks.Split, specs: Sequence[str], seed: int, count: int
    ) -> list[tasks.Problem]:
        """Return up to ``count`` problems, shared evenly among tasks.

        A file that serves both splits is shared out; one that serves a single split gives all it has.
        """
        alone = not set(self.evaluation_specs) & set(self.calibration_specs)
        chosen = [self.tasks_by_spec[spec].serving(split, whole=alone) for spec in specs]
        held = [task.available(split) for task in chosen]
        count = min([count, *(len(chosen) * n for n in held if n is not None)])
        if not count:
            raise UsageError(
                f"task {', '.join(specs)} holds no {split} problem",
                remedy="give a file with more problems, or another --calibration-task",
            )
        return tasks.problems_of(chosen, split, seed, count)

    def reaching(self, sparsity: float) -> Job:
        """Return the job of a recipe for that sparsity, for the same model: what one step of a schedule is called."""
        prune = self.recipe.prune
        if sparsity == prune.sparsity:
            return self
        steps = tuple(step for step in prune.schedule if step <= sparsity)
        reached = prune.model_copy(update={"sparsity": sparsity, "schedule": steps})
        job = replace(self, recipe=self.recipe.model_copy(update={"prune": reached}))
        vars(job)["model"] = self.model  # found once: a model on the Hub may be another one by now
        return job

    @property
    def fine_tune(self) -> str:
        """What was done to the model: calibration or other method, and pattern."""
        prune = self.recipe.prune
        pattern = prune.pattern.replace(":", "of") if prune.kept_of else f"{100 * prune.sparsity:g}"
        how = self.recipe.calibration.source if prune.method == "sparsegpt" else prune.method
        return f"{how}-{pattern}"

    @property
    def name(self) -> str:
        """Name of the pruned model: base, size, and what was done to it."""
        size = "" if _SIZE.search(self.model.name) else f"-{size_label(self.parameters)}"
        return f"{self.model.name}{size}-{self.fine_tune}"

    @property
    def artifact_name(self) -> str:
        """File name of the exported artifact, without suffix: GGUF's rule, which does for every format.

        Source: ggml/docs/gguf.md, "GGUF Naming Convention": BaseName-SizeLabel-FineTune-Version-Encoding.
        """
        return f"{self.name}-v1.0-{self.recipe.export.quant.upper()}"

    @cached_property
    def parameters(self) -> int:
        """How many weights the checkpoint holds."""
        return sum(math.prod(entry.shape) for entry in self.checkpoint.entries.values())

    @cached_property
    def mix(self) -> presets.Mix:
        """Which number format each tensor gets."""
        return presets.read(self.recipe.export.quant, self.recipe.export.tensors)

    @property
    def grid(self) -> str:
        """The number format whose codes are chosen while pruning.

        Raises:
            UsageError: the linears have several, or one that is no grid, or that does not divide a linear.
        """
        named = sorted({self._quant_of(name) for name in self.pruned()})
        if len(named) > 1:
            raise UsageError(
                f"prune.joint needs one number format for all linears, {self.mix.name} gives them {', '.join(named)}",
                remedy="choose a quant in place of a preset, and no export.tensors, or prune.joint = false",
            )
        grid = quant.as_grid(named[0])
        for name in self.pruned():
            if why := quant.fits(grid, self.checkpoint.entries[name].shape[1]):
                raise UsageError(
                    f"prune.joint with quant {named[0]!r}: {name}: {why}",
                    remedy="name the linear in prune.dense, or prune.joint = false",
                )
        return named[0]

    def _quant_of(self, linear: str) -> str:
        """Return the number format of a prunable weight, given its name in the checkpoint."""
        family = self.checkpoint.family
        index, _, name = linear.removeprefix(f"{family.blocks}.").partition(".")
        stored = f"blk.{index}.{family.block_tensors[name]}"
        return self.mix.choose(stored, self.checkpoint.block_count, self.checkpoint.tied).quant

    def prunable(self) -> list[str]:
        """Return the names of the weights that are pruned, in forward order."""
        family = self.checkpoint.family
        return [
            f"{family.blocks}.{index}.{linear}.weight"
            for index in range(self.checkpoint.block_count)
            for linear in family.linears
        ]

    def pruned(self) -> list[str]:
        """Return :meth:`prunable` without what ``prune.dense`` leaves alone."""
        patterns = self.recipe.prune.dense
        return [
            n
            for n in self.prunable()
            if not any(re.search(p, n.removesuffix(".weight")) for p in patterns)
        ]

    def file_sparsity(self, exported: ExportResult) -> float:
        """Return the fraction of zeros in an exported file, over the prunable weights."""
        prunable = set(self.prunable())
        rows = [
            (t.zeros, t.shape[0] * t.shape[1]) for t in exported.tensors if t.source in prunable
        ]
        return sum(zeros * size for zeros, size in rows) / sum(size for _, size in rows)

    def sparsity_asked(self, linears: Sequence[LinearRow]) -> float:
        """Return the fraction of zeros that was asked of the linears, over the prunable weights."""
        sizes = {
            name.removesuffix(".weight"): math.prod(self.checkpoint.entries[name].shape)
            for name in self.prunable()
        }
        return sum(row.sparsity_asked * sizes[row.name] for row in linears) / sum(sizes.values())

    def task_identity(self, spec: str) -> dict[str, str]:
        """Return what decides the prompts of a task: its name, and the contents of its file."""
        pool = "\n".join(
            f"{p.question}\0{p.gold}\0{p.scorer}" for p in self.tasks_by_spec[spec].pool
        )
        return {"name": spec.partition(":")[0], "pool": hashlib.sha256(pool.encode()).hexdigest()}

    @property
    def _arms(self) -> int:
        """How many models answer at most: ``same-size`` stands for two."""
        controls = self.recipe.verify.controls
        return 2 + len(controls) + (SAME_SIZE in controls)

    def _plan(self) -> dict[str, Any]:
        recipe, checkpoint, prunable = self.recipe, self.checkpoint, set(self.prunable())
        bits = quant.load(self.mix.quant).BITS
        sizes = {name: math.prod(entry.shape) for name, entry in checkpoint.entries.items()}
        body = sum(sizes[name] for name in prunable)
        rest = sum(sizes.values()) - body
        body_bits = sum(sizes[name] * quant.load(self._quant_of(name)).BITS for name in prunable)
        prompts, settings = len(self.problems("evaluation")), recipe.verify
        cache = 2 * checkpoint.block_count * checkpoint.key_value_heads * checkpoint.head_size * 2
        return {
            "model": recipe.model,
            "architecture": checkpoint.family.architecture,
            "parameters": body + rest,
            "prunable_parameters": body,
            "linears_pruned": len(self.pruned()),
            "linears_kept_dense": len(prunable) - len(self.pruned()),
            "thinks": self.tags is not None,
            "traces_from": recipe.traces.server or "transformers",
            "trace_prompts": len(self.problems("calibration")),
            "trace_tokens_at_most": len(self.problems("calibration"))
            * recipe.traces.max_new_tokens,
            "evaluation_tokens_at_most": self._arms
            * prompts
            * settings.samples
            * settings.max_new_tokens,
            **plan(settings, self.gate, Expectation(), prompts),
            "artifact_bytes": round(body_bits / 8 + rest * max(bits, 8.5) / 8),
            "cache_bytes": cache * settings.context_tokens,
            "verify_memory_bytes_at_least": 4
            * (body + rest),  # one checkpoint at a time, in float32 under torch
            "artifact": self.artifact_name,
        }


def size_label(parameters: int) -> str:
    """Return how many parameters there are as a name says it, as ``1.5B`` or ``135M``."""
    letter, scale = next(
        ((letter, scale) for letter, scale in _LABELS if parameters >= scale), _LABELS[-1]
    )
    number = parameters / scale
    return f"{number:.1f}".removesuffix(".0") + letter if number < 10 else f"{number:.0f}{letter}"


def _check_pattern(name: str, inputs: int, kept_of: tuple[int, int] | None) -> None:
    if kept_of and inputs % kept_of[1]:
        raise UsageError(
            f"pattern {kept_of[0]}:{kept_of[1]} does not divide the {inputs} inputs of {name}",
            remedy=f"choose an M that divides {inputs}, or --pattern unstructured",
        )


def _require(packages: Mapping[str, str]) -> None:
    for package, extra in packages.items():
        if not is_installed(package):
            raise MissingExtraError(package, extra)
