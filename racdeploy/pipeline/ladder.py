"""The ladder: build the smallest rung that is no farther from dense than the file people download.

Rungs are dense and cut models, the widest first. The narrowest is pruned and measured first. Where
it is farther than the download, the next one is predicted, so that two prunings are enough as a
rule. What is built is verified; where its answers show a loss, the next wider rung is built and
verified on fresh prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy import exporting
from racdeploy.engines.decoding_speed import compare_speed
from racdeploy.errors import UsageError
from racdeploy.exporting import ExportResult
from racdeploy.pipeline.artifact_sizes import ArtifactSize, SizePredictor
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.bundling import BundleContents
from racdeploy.pipeline.divergence_stage import DivergenceMeter, FileDivergence
from racdeploy.pipeline.export_stage import export_model, store_plainly
from racdeploy.pipeline.preflight import check_memory, plan_artifact
from racdeploy.pipeline.rung_losses import divide, find_farther, find_losses, pair_kinds
from racdeploy.pipeline.trace_engine import name_dense
from racdeploy.recipe import LadderLimits
from racdeploy.recipe_settings import RecipeSettings
from racdeploy.results.plan import Plan, TimePlan
from racdeploy.results.report import Report
from racdeploy.targets import Rung, Target

_CHOSEN_CODES_SHARE = 2 / 3
"""Share of the KL of nearest codes that chosen ones leave, as a rule at most: of Gemma 3 270M in
Q4_0 0.1 on traces and 0.4 on text, calibrated on 11,000 tokens.
"""


@dataclass(frozen=True)
class OpenRung:
    """A rung of the ladder for the model at hand.

    Args:
        build: makes it.
        size: predicted size of its artifact, and the bytes that a token reads.
    """

    build: Build
    size: ArtifactSize

    @property
    def is_cut(self) -> bool:
        """Whether parts of the model are removed."""
        return bool(self.build.job.recipe.structure.keep)


@dataclass(frozen=True)
class _Measured:
    """The file of a rung, and its distance from the dense model.

    Args:
        farther: kinds of text on which it is too far, with the ratio of its KL to the download's.
        is_slow: it decodes more slowly than the download.
    """

    name: str
    divergence: FileDivergence
    farther: Mapping[str, float]
    is_slow: bool = False

    @property
    def is_near(self) -> bool:
        return not self.farther and not self.is_slow


@dataclass(frozen=True)
class Ladder:
    """The default strategy of a build: its recipe names several rungs, and one is shipped."""

    build: Build

    def run(self, out: Path | None = None) -> tuple[Path, Report]:
        """Choose a rung and build it, a wider one where its answers show a loss; return its bundle.

        The widest rung is shipped whatever its verification finds.
        """
        names = list(self.rungs)
        self.rungs[names[-1]].build.check(out)
        shorter = self.build.shorten()
        if shorter is not self.build:
            return replace(self, build=shorter).run(out)

        chosen, notes = self._choose()
        at_least_as_wide = names[: names.index(chosen) + 1]
        contents, stepped_back = self._make(at_least_as_wide)
        notes.append(self._report_on_text(contents))

        notes += contents.report.notes
        changes = {"stepped_back": stepped_back, "notes": tuple(notes)}
        report = contents.report.model_copy(update=changes)
        return self.build.write(replace(contents, report=report), out)

    def plan(self, out: Path | None = None) -> Plan:
        """Return the rungs and the plan of the narrowest, which is tried first."""
        informed = self.build.with_answer_limit()
        if informed is not self.build:
            return replace(self, build=informed).plan(out)

        names = list(self.rungs)
        build = self.rungs[names[-1]].build
        plan = build.plan(build.check(out))
        return replace(plan, rungs=tuple(names), download=self.download, time=self._plan_time(plan))

    @cached_property
    def rungs(self) -> dict[str, OpenRung]:
        """Rungs by name, the largest first, without those that bring nothing.

        One of them has the download's own number format: its codes are chosen, so that a file of
        that size is nearer to the dense model than the download.

        Raises:
            UsageError: no rung fits the model and the target's memory, or the target cannot store
                the download.
        """
        rungs, _ = self._opened
        fast = dict(rungs)
        for name in self._list_candidates(rungs):
            if not self._is_predicted_fast(rungs[name]):
                del fast[name]
        return fast

    @cached_property
    def _opened(self) -> tuple[dict[str, OpenRung], ArtifactSize]:
        """Rungs that fit the model and the target's memory, the largest first; the download's size.

        All are predicted by one predictor, which plans tokenizer and shapes of a cut once.
        """
        download = self._open(Rung(quant=self.download))
        exporting.check(download.job.recipe.export)
        rungs = {}
        errors = []
        with tempfile.TemporaryDirectory() as scratch:  # a plan leaves the work folder alone
            sizes = SizePredictor(Path(scratch))
            for rung in (*self.build.job.recipe.rungs, Rung(quant=self.download)):
                try:
                    build = self._open(rung)
                    self._target.check(build.job.recipe.export.format, rung.quant, 0)
                    check_memory(build.job, plan_artifact(build.job))
                except UsageError as error:
                    errors.append(error)
                    continue
                # A cut that the model does not allow is none: it replaces that rung, with a note.
                name = str(Rung(quant=rung.quant, keep=build.job.recipe.structure.keep))
                rungs[name] = OpenRung(build, sizes.predict(build.job))
            if not rungs:
                raise errors[0]
            download_size = sizes.predict(download.job)

        largest_first = sorted(rungs, key=lambda name: -rungs[name].size.size_bytes)
        return {name: rungs[name] for name in largest_first}, download_size

    @property
    def download(self) -> str:
        """Number format of the file that people download."""
        named = self._limits.no_worse_than
        return named or exporting.load(self.build.job.recipe.export.format).COMMON_QUANTS[1]

    @property
    def _target(self) -> Target:
        return Target.read(self.build.job.recipe.target)

    @property
    def _limits(self) -> LadderLimits:
        return self.build.job.recipe.ladder

    @property
    def _download_size(self) -> ArtifactSize:
        _, size = self._opened
        return size

    @cached_property
    def _download_file(self) -> ExportResult:
        """The dense model as the engine's own tool stores it: nearest codes, no importance."""
        return self._export_nearest(self.download)

    @cached_property
    def _meter(self) -> DivergenceMeter:
        return DivergenceMeter(self.build)

    def _open(self, rung: Rung) -> Build:
        job = self.build.job
        _ = job.encoder, job.tasks  # all rungs share them
        recipe = job.recipe
        settings: RecipeSettings = {
            "export": {"quant": rung.quant},
            "structure": {"keep": rung.keep, "optional": True},
            "verify": {"controls": recipe.verify.controls or (self.download,)},
        }
        return replace(
            self.build, job=job.with_recipe(recipe.without_pruning().with_settings(settings))
        )

    def _export_nearest(self, quant: str) -> ExportResult:
        """Export the dense model with the nearest codes of a number format."""
        job = self.build.job
        return export_model(
            self.build.workspace,
            job.checkpoint.folder,
            name_dense(job, quant),
            store_plainly(job.recipe.export, quant),
            metadata={},
            importance=None,
            label="export dense",
        )

    def _list_candidates(self, rungs: Mapping[str, OpenRung]) -> list[str]:
        """Return the rungs that are at most as large as the download, or else the narrowest."""
        largest = self._download_size.size_bytes
        small = []
        for name, rung in rungs.items():
            if rung.size.size_bytes <= largest:
                small.append(name)
        return small or list(rungs)[-1:]

    def _is_predicted_fast(self, rung: OpenRung) -> bool:
        """Return whether the target decodes it about as fast as the download.

        True if the target has no figures of its device: files are measured then, when there are
        any.
        """
        device = self._target.device
        if device is None:
            return True
        own_s = device.predict_token_s(rung.size.read_bytes)
        download_s = device.predict_token_s(self._download_size.read_bytes)
        return own_s <= download_s / self._limits.min_speed

    def _choose(self) -> tuple[str, list[str]]:
        """Return the rung to build, and notes on what was measured.

        Of those that were measured, the smallest that is near enough; if none is, the nearest.

        Returns:
            The name of the rung, and a note on each file: what it is, its distance from the dense
            model, and whether it is farther than the download.
        """
        candidates = self._list_candidates(self.rungs)
        download = self._meter.measure(self._download_file)
        notes = [f"{self.download} as a download: {_describe(download)}"]

        measured: list[_Measured] = []
        while True:
            name = self._find_next(candidates, measured, download)
            if name is None:
                break
            measured.append(self._measure(name, download))
            notes.append(self._describe_rung(measured[-1], download))

        if measured[-1].is_near:
            return measured[-1].name, notes

        def worst_ratio(rung: _Measured) -> float:
            return max(_list_ratios(rung.divergence, download))

        nearest = min(measured, key=worst_ratio)
        notes.append(f"no rung is as near as {self.download}: {nearest.name} is the nearest")
        return nearest.name, notes

    def _find_next(
        self, candidates: Sequence[str], measured: Sequence[_Measured], download: FileDivergence
    ) -> str | None:
        """Return the candidate to prune and measure next; None if that is enough.

        The narrowest comes first. The second is predicted; where the prediction was wrong, the
        widest is the last.

        Args:
            candidates: names, the widest first.
            measured: what was pruned and measured, in that order.
            download: of the file that people download.
        """
        if not measured:
            return candidates[-1]
        done = [each.name for each in measured]
        if measured[-1].is_near or candidates[0] in done:
            return None
        if len(measured) == 1:
            return self._predict_near(candidates, measured[0], download)
        return candidates[0]

    def _predict_near(
        self, candidates: Sequence[str], narrowest: _Measured, download: FileDivergence
    ) -> str:
        """Return the narrowest other candidate that is likely to be near enough.

        Of a rung without a cut, chosen codes leave a share of the KL of nearest ones. Of a cut one,
        the logarithm of KL is interpolated over the size, between the narrowest rung, which was
        measured, and the widest.

        Args:
            candidates: names, the widest first.
            narrowest: the rung that was measured, and is too far.
            download: of the file that people download.
        """
        widest = self.rungs[candidates[0]]
        narrow_bytes = self.rungs[narrowest.name].size.size_bytes
        wide_bytes = widest.size.size_bytes
        narrow_ratios = _list_ratios(narrowest.divergence, download)
        wide_ratios = self._predict_ratios(widest, download)
        between = candidates[1:-1]

        for name in reversed(between):
            rung = self.rungs[name]
            if rung.is_cut:
                step = (rung.size.size_bytes - narrow_bytes) / (wide_bytes - narrow_bytes)
                ratios = _interpolate(narrow_ratios, wide_ratios, step)
            else:
                ratios = self._predict_ratios(rung, download)
            if max(ratios) <= 1 + self._limits.max_excess:
                return name
        return candidates[0]

    def _predict_ratios(self, rung: OpenRung, download: FileDivergence) -> list[float]:
        """Return the expected ratios of a rung's KL to the download's, its cut left out."""
        quant = rung.build.job.recipe.export.quant
        nearest = self._meter.measure(self._export_nearest(quant))
        return [_CHOSEN_CODES_SHARE * ratio for ratio in _list_ratios(nearest, download)]

    def _measure(self, name: str, download: FileDivergence) -> _Measured:
        """Prune, export and measure a rung."""
        build = self.rungs[name].build
        exported = build.export_pruned()
        divergence = self._meter.measure(exported)
        farther = find_farther(self._limits, divergence, download)
        is_slow = not farther and not self._is_fast(name, exported)
        return _Measured(name, divergence, farther, is_slow)

    def _is_fast(self, name: str, exported: ExportResult) -> bool:
        """Return whether a file decodes about as fast as the download on this machine.

        It is measured where no figures of the target's device are known, and where the file reads
        more than the download, or number formats that the download does not have.
        """
        if self._target.device:
            return True
        own = self.rungs[name].size.read_bytes
        download = self._download_size.read_bytes
        own_bytes = sum(own.values())
        download_bytes = sum(download.values())
        has_known_formats = set(own) <= set(download)
        reads_less = own_bytes <= download_bytes
        if has_known_formats and reads_less:
            return True

        speed = compare_speed(
            exported.path,
            self._download_file.path,
            self.build.job.backend,
            self.build.threads,
        )
        # A busy machine must not decide which file is shipped: slow is what is shown to be slow.
        return speed.upper >= self._limits.min_speed

    def _describe_rung(self, rung: _Measured, download: FileDivergence) -> str:
        words = f"{rung.name}: {_describe(rung.divergence)}"
        if rung.is_slow:
            return f"{words}; it decodes more slowly than {self.download}"
        if rung.farther:
            kinds = []
            for kind, ratio in rung.farther.items():
                kinds.append(f"{ratio:.2g} on {kind}")

            parts = " and ".join(kinds)
            return f"{words}; not shown to be as near as {self.download}: times its KL {parts}"
        return f"{words}; no farther than {self.download}"

    def _report_on_text(self, contents: BundleContents) -> str:
        """Return a note on texts by which nothing was chosen."""
        own = self._meter.measure(contents.artifacts[0].result, "report").text
        download = self._meter.measure(self._download_file, "report").text
        return (
            f"on text by which nothing was chosen: KL {own.kl:.2g}, "
            f"{own.same_share:.1%} equal first tokens; {self.download} as a download "
            f"{download.kl:.2g}, {download.same_share:.1%}"
        )

    def _make(self, names: list[str]) -> tuple[BundleContents, tuple[str, ...]]:
        """Make the last of some rungs; step back to the one before while a rung loses something.

        Returns:
            What to ship, and the rungs that were stepped back from, with their losses.
        """
        stepped_back: list[str] = []
        for failures, name in enumerate(reversed(names)):
            build = self._with_fresh_prompts(self.rungs[name].build, failures)
            contents = build.make()
            losses = find_losses(contents.report, self.download)
            if not losses:
                break
            if name != names[0]:
                causes = ", ".join(losses)
                stepped_back.append(f"{name} ({causes})")

        return contents, tuple(stepped_back)

    def _with_fresh_prompts(self, build: Build, failures: int) -> Build:
        """Return a build whose verification asks other prompts than those before it."""
        recipe = build.job.recipe
        seed = recipe.verify.seed + failures
        return replace(
            build, job=build.job.with_recipe(recipe.with_settings({"verify": {"seed": seed}}))
        )

    def _plan_time(self, plan: Plan) -> TimePlan | None:
        """Return the time of a plan, with a second pruning where the first may be too far."""
        if plan.time is None or len(self._list_candidates(self.rungs)) == 1:
            return plan.time
        seconds = dict(plan.time.stage_seconds)
        if "prune" in seconds:
            seconds["prune"] *= 2
        return replace(plan.time, stage_seconds=seconds)


def _interpolate(first: Sequence[float], last: Sequence[float], step: float) -> list[float]:
    """Return the numbers at a share of the way from some to others, on a logarithmic scale."""
    between = []
    for near, far in zip(first, last, strict=True):
        between.append(near ** (1 - step) * far**step)
    return between


def _list_ratios(own: FileDivergence, download: FileDivergence) -> list[float]:
    """Return the ratio of both KLs on each kind of text that counts."""
    return [divide(ours.kl, theirs.kl) for _, ours, theirs in pair_kinds(own, download)]


def _describe(divergence: FileDivergence) -> str:
    by_kind = {"traces": divergence.traces, "text": divergence.text}
    words = []
    for kind, passages in by_kind.items():
        share = f"{passages.same_share:.1%} equal first tokens"
        words.append(f"{passages.kl:.2g} on {kind} ({share})")
    known = "" if divergence.knows_text else ", which the dense model does not know"
    return f"KL from the dense model {', '.join(words)}{known}"
