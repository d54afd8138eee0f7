"""One recipe, resolved: its model, tokenizer, tasks and problems, and the check before any work."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy import bundle, packing, quant, tasks
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.models import ResolvedModel, resolve
from racdeploy.recipe import Recipe, Target
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, find_tags

__all__ = ["Job"]

_NEEDS = {"torch": "prune", "transformers": "prune", "gguf": "gguf", "llama_cpp": "llamacpp"}


@dataclass(frozen=True)
class Job:
    """What a recipe means on this machine.

    Args:
        recipe: what to do.
    """

    recipe: Recipe

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

    def check(self, out: Path | None = None) -> dict[str, Any]:
        """Look at everything that can be known before any work, and return the plan.

        Args:
            out: where the bundle will go.

        Raises:
            RacdeployError: the first thing that would go wrong later.
        """
        recipe, checkpoint = self.recipe, self.checkpoint
        _require(_NEEDS)
        packing.check(recipe.export.quant, recipe.export.packing)
        if out is not None:
            bundle.check_replaceable(out)
        prunable = self.prunable()
        for name in prunable:
            _check_pattern(name, checkpoint.entries[name].shape[1], recipe.prune.kept_of)
        stop_ids, prompt = checkpoint.eos_ids, self.encoder.encode("2 + 2?")
        longest = recipe.verify.max_new_tokens
        if longest + len(prompt) >= recipe.verify.context_tokens:
            raise UsageError(
                f"verify.max_new_tokens {longest} leaves no room for a prompt in {recipe.verify.context_tokens} tokens",
                remedy="raise verify.context_tokens or lower verify.max_new_tokens",
            )
        self.problems("evaluation")
        self.problems("calibration")
        plan = self._plan(prunable, stop_ids)
        target = Target.read(recipe.target)
        if plan["artifact_bytes"] > target.memory_limit_bytes:
            raise UsageError(
                f"the artifact takes {plan['artifact_bytes'] / 1e9:.2f} GB, "
                f"target {target.name!r} holds {target.memory_limit_bytes / 1e9:.2f} GB",
                remedy="choose a smaller quant, a smaller model, or another target",
            )
        return plan

    def problems(self, split: tasks.Split) -> list[tasks.Problem]:
        """Return the problems of a split; a file given alone is shared out, two files must not overlap."""
        calibrating = split == "calibration"
        specs = self.calibration_specs if calibrating else self.evaluation_specs
        settings = self.recipe.traces if calibrating else self.recipe.verify
        chosen = [self.tasks_by_spec[spec] for spec in specs]
        count = settings.count
        if "count" not in settings.model_fields_set:  # a short file gives what it has, unless more was asked for
            held = [task.available(split) for task in chosen]
            count = min([count, *(len(chosen) * n for n in held if n is not None)])
        return tasks.problems_of(chosen, split, settings.seed, count)

    @property
    def name(self) -> str:
        """Name of the pruned model: base, method and pattern."""
        prune = self.recipe.prune
        pattern = prune.pattern.replace(":", "of") if prune.kept_of else f"{100 * prune.sparsity:g}"
        return f"{self.model.name}-{self.recipe.calibration.source}-{pattern}"

    @property
    def artifact_name(self) -> str:
        """File name of the exported artifact, without suffix."""
        return f"{self.name}-{self.recipe.export.quant}"

    def prunable(self) -> list[str]:
        """Return the names of the weights that are pruned, in forward order."""
        family = self.checkpoint.family
        return [
            f"{family.blocks}.{index}.{linear}.weight"
            for index in range(self.checkpoint.block_count)
            for linear in family.linears
        ]

    def task_identity(self, spec: str) -> dict[str, str]:
        """Return what decides the prompts of a task: its name, and the contents of its file."""
        pool = "\n".join(f"{p.question}\0{p.gold}" for p in self.tasks_by_spec[spec].pool)
        return {"name": spec.partition(":")[0], "pool": hashlib.sha256(pool.encode()).hexdigest()}

    def _plan(self, prunable: Sequence[str], stop_ids: tuple[int, ...]) -> dict[str, Any]:
        bits = quant.load(self.recipe.export.quant).BITS
        sizes = {name: math.prod(entry.shape) for name, entry in self.checkpoint.entries.items()}
        body = sum(sizes[name] for name in prunable)
        rest = sum(sizes.values()) - body
        widths = [self.checkpoint.entries[name].shape[1] for name in prunable[: len(self.checkpoint.family.linears)]]
        return {
            "model": self.recipe.model,
            "architecture": self.checkpoint.family.architecture,
            "parameters": body + rest,
            "prunable_parameters": body,
            "thinking": self.tags is not None,
            "stop_ids": list(stop_ids),
            "trace_prompts": self.recipe.traces.count,
            "evaluation_prompts": self.recipe.verify.count,
            "artifact_bytes": round(body * bits / 8 + rest * max(bits, 8.5) / 8),
            "statistics_bytes": max(widths) ** 2 * 4 * 4 * len(self.checkpoint.family.input_groups),
            "prunes_to": self.artifact_name,
        }


def _check_pattern(name: str, inputs: int, kept_of: tuple[int, int] | None) -> None:
    if kept_of and inputs % kept_of[1]:
        raise UsageError(
            f"pattern {kept_of[0]}:{kept_of[1]} does not divide the {inputs} inputs of {name}",
            remedy=f"choose an M that divides {inputs}, or --pattern unstructured",
        )


def _require(packages: Mapping[str, str]) -> None:
    for package, extra in packages.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
