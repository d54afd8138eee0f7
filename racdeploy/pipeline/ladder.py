"""The ladder: build the narrowest rung of a target that loses nothing measurable.

Rungs are dense and cut models, the widest first. Which one is tried first is decided before export,
by the KL divergence from the dense model on held-out traces and on text of another kind. Where the
verification of a rung fails, the next wider one is built and verified on fresh prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy import exporting
from racdeploy.errors import UsageError
from racdeploy.pipeline.artifact_sizes import SizePredictor
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.bundling import BundleContents
from racdeploy.pipeline.divergence_stage import MeanDivergence, measure_divergence
from racdeploy.pipeline.preflight import check_memory, plan_artifact
from racdeploy.pipeline.rung_losses import find_losses
from racdeploy.recipe import LadderLimits
from racdeploy.recipe_settings import RecipeSettings
from racdeploy.results.plan import Plan
from racdeploy.results.report import Report
from racdeploy.targets import Device, Rung, Target


@dataclass(frozen=True)
class _DecodingCost:
    """Predicted size of an artifact, and its time per token on the target.

    ``token_cost`` is in seconds; without figures of the device, in bytes that are read.
    """

    size_bytes: int
    token_cost: float


@dataclass(frozen=True)
class Ladder:
    """The default strategy of a build: its recipe names several rungs, and one is shipped."""

    build: Build

    def run(self, out: Path | None = None) -> tuple[Path, Report]:
        """Build and verify from the first rung on, until one loses nothing; return its bundle.

        The widest rung is shipped whatever its verification finds.
        """
        names = list(self.rungs)
        self.rungs[names[-1]].check(out)
        shorter = self.build.shorten()
        if shorter is not self.build:
            return replace(self, build=shorter).run(out)

        first, notes = self._choose(names)
        contents, stepped_back = self._make(names[: first + 1])

        report = contents.report.model_copy(
            update={"stepped_back": stepped_back, "notes": (*notes, *contents.report.notes)}
        )
        return self.build.write(replace(contents, report=report), out)

    def plan(self, out: Path | None = None) -> Plan:
        """Return the rungs and the plan of the narrowest, which is tried first."""
        names = list(self.rungs)
        build = self.rungs[names[-1]]
        return replace(build.plan(build.check(out)), rungs=tuple(names))

    @cached_property
    def rungs(self) -> dict[str, Build]:
        """Build of each rung by name, the widest first, without those that bring nothing.

        Raises:
            UsageError: no rung fits the model and the target's memory.
        """
        builds = {}
        errors = []
        for rung in self.build.job.recipe.rungs:
            try:
                build = self._open(rung)
                check_memory(build.job, plan_artifact(build.job))
            except UsageError as error:
                errors.append(error)
                continue
            # A cut that the model does not allow is none: it replaces that rung, with a note.
            keep = build.job.recipe.structure.keep
            builds[str(Rung(quant=rung.quant, keep=keep))] = build

        if not builds:
            raise errors[-1]
        return self._leave_out_slow(builds)

    @property
    def _limits(self) -> LadderLimits:
        return self.build.job.recipe.ladder

    @property
    def _common_quant(self) -> str:
        """The narrow number format that people download."""
        return exporting.load(self.build.job.recipe.export.format).COMMON_QUANTS[1]

    def _open(self, rung: Rung) -> Build:
        job = self.build.job
        _ = job.encoder, job.tasks  # all rungs share them
        recipe = job.recipe
        settings: RecipeSettings = {
            "export": {"quant": rung.quant},
            "structure": {"keep": rung.keep, "optional": True},
            "verify": {"controls": recipe.verify.controls or (self._common_quant,)},
        }
        return replace(
            self.build, job=job.with_recipe(recipe.without_pruning().with_settings(settings))
        )

    def _leave_out_slow(self, builds: Mapping[str, Build]) -> dict[str, Build]:
        """Leave out rungs that are narrower than a common narrow format, and slower to decode."""
        device = Target.read(self.build.job.recipe.target).device

        with tempfile.TemporaryDirectory() as scratch:  # a plan leaves the work folder alone
            sizes = SizePredictor(Path(scratch))
            common = _predict_cost(self._open(Rung(quant=self._common_quant)), sizes, device)
            fast = {}
            for name, build in builds.items():
                cost = _predict_cost(build, sizes, device)
                is_wide = cost.size_bytes >= common.size_bytes
                if is_wide or cost.token_cost <= common.token_cost:
                    fast[name] = build
        return fast

    def _choose(self, names: list[str]) -> tuple[int, list[str]]:
        """Return the index of the rung to try first, and notes on the divergences measured.

        They are measured from the narrowest on; the widest needs no measurement.
        """
        notes = []
        index = len(names) - 1
        while index > 0:
            divergence = measure_divergence(self.rungs[names[index]])
            notes.append(f"{names[index]}: {self._describe(divergence)}")
            if not find_losses(self._limits, divergence):
                break
            index -= 1
        return index, notes

    def _describe(self, divergence: MeanDivergence) -> str:
        limits = self._limits
        return (
            "KL from the dense model "
            f"{divergence.traces:.2g} on traces (limit {limits.max_kl_traces:g}), "
            f"{divergence.text:.2g} on text (limit {limits.max_kl_text:g})"
        )

    def _make(self, names: list[str]) -> tuple[BundleContents, tuple[str, ...]]:
        """Make the last of some rungs; step back to the one before while a rung loses something.

        Returns:
            What to ship, and the rungs that were stepped back from, with their losses.
        """
        stepped_back: list[str] = []
        while True:
            name = names[-1 - len(stepped_back)]
            contents = self._with_fresh_prompts(self.rungs[name], len(stepped_back)).make()
            losses = find_losses(self._limits, report=contents.report)
            if not losses or name == names[0]:
                return contents, tuple(stepped_back)
            stepped_back.append(f"{name} ({', '.join(losses)})")

    def _with_fresh_prompts(self, build: Build, failures: int) -> Build:
        """Return a build whose verification asks other prompts than those before it."""
        recipe = build.job.recipe
        seed = recipe.verify.seed + failures
        return replace(
            build, job=build.job.with_recipe(recipe.with_settings({"verify": {"seed": seed}}))
        )


def _predict_cost(build: Build, sizes: SizePredictor, device: Device | None) -> _DecodingCost:
    size = sizes.predict(build.job)
    if device is None:
        return _DecodingCost(size.size_bytes, sum(size.read_bytes.values()))
    return _DecodingCost(size.size_bytes, device.predict_token_s(size.read_bytes))
