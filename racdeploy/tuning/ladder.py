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
from importlib.resources import files
from pathlib import Path

import numpy as np

from racdeploy import exporting
from racdeploy.errors import UsageError
from racdeploy.files.reading import Json
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.preflight import check_memory, plan_build
from racdeploy.pipeline.workspace import identify_code
from racdeploy.pruning import PrunedModel
from racdeploy.results.report import Report
from racdeploy.results.units import format_points
from racdeploy.targets import Rung, Target
from racdeploy.traces.trace import TraceSet
from racdeploy.tuning.artifact_sizes import SizePredictor
from racdeploy.tuning.dense_logits import DenseLogits, make_opener
from racdeploy.tuning.speed import predict_token_s
from racdeploy.verification.answer_sampler import TraceIds

MAX_KL = {"traces": 8e-4, "text": 0.1}
"""Largest mean KL in nats of a rung that is tried, on held-out traces and on plain text.

On two reasoners, files up to 7.2e-4 on traces lost at most 0.1 points of 1,000 prompts, those from
9.2e-4 on lost 1.6 to 17 (benchmarks/RESULTS.md, "Optimized rounding"). Q3_K rounded to nearest has
0.23 on text.
"""
MAX_LOSS, MAX_LENGTH_RATIO = 0.015, 1.03
"""Largest upper bounds of a loss of accuracy and of the thinking length that are no loss."""
_MIN_PROMPTS = 1000
_MAX_TRACES, _MAX_TEXT_TOKENS = 32, 1024
_TEXT = files("racdeploy.tuning") / "plain_text.txt"


def find_losses(report: Report) -> list[str]:
    """Return what a verification found to be worse than dense; empty if nothing measurable is.

    Beside failed checks these are upper bounds of the losses, of which fewer than 1,000 prompts
    would say little.
    """
    causes = [f"{check.name} failed" for check in report.checks if check.verdict == "fail"]
    compared = report.comparison
    if compared is None or compared.n < _MIN_PROMPTS:
        return causes
    if compared.drop_upper > MAX_LOSS:
        causes.append(f"a loss of up to {format_points(compared.drop_upper)} points")
    if compared.length_upper and compared.length_upper > MAX_LENGTH_RATIO:
        causes.append(f"thinking up to {compared.length_upper:.3f} times as long")
    return causes


@dataclass(frozen=True)
class Ladder:
    """The rungs of a build whose recipe names several; ``out`` is the folder of the bundle."""

    build: Build
    out: Path | None = None

    def run(self) -> tuple[Path, Report]:
        """Build and verify from the first rung on, until one does not fail; return its bundle."""
        rungs = self.rungs
        names = list(rungs)
        rungs[names[-1]].check(self.out)
        if (shorter := self.build.shorten()) is not self.build:
            return replace(self, build=shorter).run()

        index, notes = self._choose(names)
        failed: list[str] = []
        while True:
            build = rungs[names[index]]
            # Fresh prompts after each failure.
            recipe = build.job.recipe
            settings = {"verify": {"seed": recipe.verify.seed + len(failed)}}
            build = replace(build, job=build.job.with_recipe(recipe.with_settings(settings)))
            contents = build.make()
            report = contents.report
            causes = find_losses(report)
            if not causes or index == 0:
                break
            failed.append(f"{names[index]} ({', '.join(causes)})")
            index -= 1

        noted = {"stepped_back": tuple(failed), "notes": (*notes, *report.notes)}
        return build.write(replace(contents, report=report.model_copy(update=noted)), self.out)

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
                check_memory(build.job, plan_build(build.job))
            except UsageError as error:
                errors.append(error)
                continue
            # A cut that the model does not allow is none: it replaces that rung, with a note.
            keep = build.job.recipe.structure.keep
            builds[str(Rung(quant=rung.quant, keep=keep))] = build

        if not builds:
            raise errors[-1]
        return self._leave_out_slow(builds)

    def plan(self) -> Json:
        """Return the rungs and the plan of the narrowest, which is tried first."""
        names = list(self.rungs)
        build = self.rungs[names[-1]]
        return {"rungs": names} | build.plan(build.check(self.out))

    @property
    def _narrow(self) -> str:
        """The narrow number format that people download."""
        return exporting.load(self.build.job.recipe.export.format).COMMON_QUANTS[1]

    def _open(self, rung: Rung) -> Build:
        job = self.build.job
        _ = job.encoder, job.tasks  # all rungs share them
        recipe = job.recipe
        settings = {
            "export": {"quant": rung.quant},
            "structure": {"keep": rung.keep, "optional": True},
            "verify": {"controls": recipe.verify.controls or (self._narrow,)},
        }
        return replace(
            self.build, job=job.with_recipe(recipe.without_pruning().with_settings(settings))
        )

    def _leave_out_slow(self, builds: Mapping[str, Build]) -> dict[str, Build]:
        """Leave out rungs that are narrower than a common narrow format, and slower to decode."""
        recipe = self.build.job.recipe
        device = Target.read(recipe.target).device

        with tempfile.TemporaryDirectory() as scratch:  # a plan leaves the work folder alone
            predictor = SizePredictor(Path(scratch))

            def predict(build: Build) -> tuple[int, float]:
                size = predictor.predict(build.job)
                read = size.read_bytes
                return size.size_bytes, (
                    predict_token_s(device, read) if device else sum(read.values())
                )

            common_bytes, common_s = predict(self._open(Rung(quant=self._narrow)))
            kept = {}
            for name, build in builds.items():
                size_bytes, token_s = predict(build)
                if size_bytes >= common_bytes or token_s <= common_s:
                    kept[name] = build
        return kept

    def _choose(self, names: list[str]) -> tuple[int, list[str]]:
        """Return the index of the rung to try first, and notes on the divergences measured.

        They are measured from the narrowest on; the widest needs no measurement.
        """
        notes = []

        def is_near(index: int) -> bool:
            kl = self._measure_kl(self.rungs[names[index]])
            measured = [f"{kl[kind]:.2g} on {kind} (limit {MAX_KL[kind]:g})" for kind in MAX_KL]
            notes.append(f"{names[index]}: KL from the dense model {', '.join(measured)}")
            return all(kl[kind] <= MAX_KL[kind] for kind in MAX_KL)

        index = len(names) - 1
        while index and not is_near(index):
            index -= 1
        return index, notes

    def _measure_kl(self, build: Build) -> dict[str, float]:
        """Return the mean KL of a rung's pruned model on both kinds of text, measured once."""
        model = build.prune()
        folder, _ = build.traces()
        inputs = identify_code(__name__) | {
            "dense": build.job.checkpoint.sha256,
            "pruned": model.checkpoint.sha256,
            "traces": TraceSet(folder).sha256,
        }
        stage = build.workspace.open("divergence", inputs)
        if not stage.is_finished:
            stage.finish(self._compare(build, model))
        return dict(stage.summary)

    def _compare(self, build: Build, model: PrunedModel) -> dict[str, float]:
        job = build.job

        kinds = {"traces": self._trace_ids(build), "text": self._text_ids(build)}
        longest = max(len(prompt) + len(rest) for each in kinds.values() for prompt, rest in each)

        dense, pruned = (
            make_opener("transformers", folder, longest + 1, build.threads)
            for folder in (job.checkpoint.folder, model.folder)
        )

        ids = [each for of_kind in kinds.values() for each in of_kind]
        kl = iter(DenseLogits(dense, ids).list_kl(pruned))
        return {
            kind: float(np.concatenate([next(kl) for _ in of_kind]).mean())
            for kind, of_kind in kinds.items()
        }

    def _trace_ids(self, build: Build) -> list[TraceIds]:
        _, traces = build.traces()
        _, held_out, _ = build.prune_stage.select_traces(traces)
        chosen = (held_out or traces)[:_MAX_TRACES]
        return [(trace.prompt_ids, trace.completion_ids) for trace in chosen]

    def _text_ids(self, build: Build) -> list[TraceIds]:
        ids = build.job.encoder.encode_text(_TEXT.read_text(encoding="utf-8"))
        length = min(256, build.job.checkpoint.shape.max_positions)
        chunks = [ids[start : start + length] for start in range(0, len(ids), length)]
        chunks = chunks[: _MAX_TEXT_TOKENS // length or 1]
        return [(tuple(chunk[:1]), tuple(chunk[1:])) for chunk in chunks if len(chunk) > 1]
