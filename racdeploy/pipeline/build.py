"""The stages in order, and the only place that knows them: traces → prune → export → verify → bundle.

Every stage leaves a folder addressed by the hash of what decides its content, so that a finished one is reused and
an interrupted one goes on.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from racdeploy import __version__
from racdeploy import export as exports
from racdeploy.decoding.engine import Completion, Engine, EngineSettings
from racdeploy.engines import open_engine
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.export import ExportResult
from racdeploy.extras import installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import bundling
from racdeploy.pipeline.comparison import Evaluation
from racdeploy.pipeline.gates import Held, hold
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import (
    count_parameters,
    describe_origin,
    label_size,
    name_artifact,
    name_model,
)
from racdeploy.pipeline.preflight import check_build
from racdeploy.prune import PrunedModel
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.report.model import BlockRow, LinearRow, Report
from racdeploy.storage.addresses import code_hash
from racdeploy.storage.files import canonical_hash, file_sha256
from racdeploy.storage.stages import Stage, scratch_folder
from racdeploy.traces import server
from racdeploy.traces.collect import Answering, Asked, collect, prompt_traces, trace_counts
from racdeploy.traces.mix import Probe, mix
from racdeploy.traces.select import select, within_budget
from racdeploy.traces.trace import Trace, TraceSet
from racdeploy.verify.controls import SAME_SIZE, same_size_quants

Progress = Callable[[str, int, int], None]
_CODE = {
    "traces": ("racdeploy.traces.collect", "racdeploy.traces.server"),
    "prune": (
        "racdeploy.prune.calibrate",
        "racdeploy.prune.assemble",
        "racdeploy.traces.mix",
        "racdeploy.traces.select",
    ),
    "export": ("racdeploy.export",),
}
_LIBRARIES = (
    "torch",
    "transformers",
)  # they compute traces and sparse weights; another version rounds otherwise


@dataclass(frozen=True)
class Build:
    """A job on its way to a bundle.

    Args:
        job: what to do.
        work: where stage folders go.
        threads: CPU threads; 0 uses every core.
        progress: called with a label, units done and units in all.
        processes: who share traces and pruning; only the first one runs the stages, the others :meth:`follow` it.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: Processes = ALONE

    def traces(self, sparse: Path | None = None) -> tuple[Path, list[Trace]]:
        """Collect a model's traces, or read them back.

        Args:
            sparse: folder of a model to ask in place of the dense one.

        Returns:
            The stage folder, and the traces in order.
        """
        settings = self.job.recipe.traces
        checkpoint = Checkpoint(sparse) if sparse else self.job.checkpoint
        stage = self._stage("traces", self.trace_inputs(checkpoint))
        out = TraceSet(stage.folder)
        if stage.finished:
            if out.sha256 != stage.summary["traces_sha256"]:
                raise ArtifactError(
                    f"the traces in {stage.folder} are not the ones that were collected",
                    remedy=f"remove {stage.folder} and run the command again",
                )
            return stage.folder, out.read()
        longest = settings.max_new_tokens + max(
            len(self.job.encoder.encode(p.question)) for p in self.job.problems("calibration")
        )
        with self._answering(longest + 1, stage.folder, checkpoint) as answer:
            traces = collect(
                answer,
                self.job.encoder,
                self.job.tags,
                self.job.checkpoint.eos_ids,
                self.job.problems("calibration"),
                settings,
                out,
                self.progress,
            )
        counts = trace_counts(traces, checkpoint, self.job.encoder, settings.identity)
        stage.finish(counts | {"traces_sha256": out.sha256})
        return stage.folder, traces

    def trace_inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return what decides the traces of a model."""
        return self._inputs("traces", () if self._served(checkpoint) else _LIBRARIES) | {
            "model": checkpoint.sha256,
            "tasks": self.job.tasks.identify_calibration(),
            "traces": self.job.recipe.traces.identity,
        }

    def prune(self) -> PrunedModel:
        """Prune the model on its traces, or find it pruned.

        Under a schedule, a step whose model answers the calibration prompts too badly or too long is undone, and the
        notes of the model before it say so.
        """
        trace_folder, dense = self.traces()
        sha256, calibration = TraceSet(trace_folder).sha256, dense
        model: PrunedModel | None = None
        for sparsity in self.job.recipe.prune.schedule or (self.job.recipe.prune.sparsity,):
            found = self._prune_to(sparsity, calibration, sha256, model)
            if not self.job.recipe.prune.schedule:
                return found
            own_folder, own = self.traces(found.folder)
            probe = Probe.of(own, dense)
            step = (
                f"schedule, {sparsity:.0%}: {probe.accuracy:.1%} of the calibration prompts right"
            )
            if reason := probe.reason(self.job.recipe.prune):
                if model is None:
                    raise UsageError(
                        f"the first step of the schedule, {sparsity:.0%}, goes too far: {reason}",
                        remedy="begin lower, or raise prune.probe_drop or prune.probe_length",
                    )
                undone = f"schedule, {sparsity:.0%} was undone: {reason}"
                return replace(model, notes=(*model.notes, undone), undone=undone)
            notes = (*(model.notes if model else ()), step, *found.notes)
            model = replace(found, notes=tuple(dict.fromkeys(notes)))
            calibration = mix(own, dense, self.job.recipe.prune.dense_traces)
            sha256 = canonical_hash([TraceSet(trace_folder).sha256, TraceSet(own_folder).sha256])
        assert model
        return model

    def _prune_to(
        self,
        sparsity: float,
        traces: Sequence[Trace],
        traces_sha256: str,
        before: PrunedModel | None,
    ) -> PrunedModel:
        """Prune the dense model to one sparsity, keeping the zeros of the model before."""
        from racdeploy.prune.assemble import assemble
        from racdeploy.prune.cost import cost_note, measured_cost, peak_bytes
        from racdeploy.prune.device import choose_device

        asked = self.job.recipe.prune
        settings = asked.model_copy(
            update={"sparsity": sparsity, "device": choose_device(asked.device).type}
        )
        quant = self.job.joint_quant if settings.joint else ""
        inputs = self._inputs("prune", _LIBRARIES) | {
            "traces_sha256": traces_sha256,
            "model": self.job.checkpoint.sha256,
            "tasks": self.job.tasks.identify_calibration(),
            "calibration": self.job.recipe.calibration.model_dump(),
            "prune": settings.model_dump(),
            "quant": quant,
            "within": Checkpoint(before.folder).sha256 if before else "",
        }
        stage = self._stage("prune", inputs)
        folder = stage.folder / name_model(self.job.at_sparsity(sparsity))
        if not stage.finished:
            calibration, held_out, counts = self.calibration(traces)
            given = {
                "calibration": calibration,
                "held_out": held_out,
                "settings": settings,
                "weights": self.job.recipe.calibration.weights,
                "quant": quant,
                "within": before.folder.parent if before else None,
            }
            tokens = sum(len(trace.ids) for trace in calibration)
            held_out_tokens = sum(len(trace.ids) for trace in held_out)
            memory = peak_bytes(self.job.checkpoint, settings, tokens, held_out_tokens, quant)
            measured = measured_cost(
                stage.folder, memory, self.processes.count, self.progress, _print_notice
            )
            with self.processes.job("prune", self._same("prune"), given), measured as progress:
                linears, blocks = self._prune_blocks(stage.folder, given, progress)
            assemble(self.job.checkpoint, stage.folder, folder)
            rows = {
                "linears": [row.model_dump() for row in linears],
                "blocks": [row.model_dump() for row in blocks],
            }
            stage.finish(rows | {"selection": counts})
        summary = stage.summary
        return PrunedModel(
            folder,
            sparsity,
            tuple(LinearRow.model_validate(row) for row in summary["linears"]),
            tuple(BlockRow.model_validate(row) for row in summary["blocks"]),
            summary["selection"],
            tuple(filter(None, [_held_out_note(summary["selection"]), cost_note(stage.folder)])),
        )

    def _prune_blocks(
        self, folder: Path, given: Mapping[str, Any], progress: Progress | None = None
    ) -> tuple[list[LinearRow], list[BlockRow]]:
        from racdeploy.prune.calibrate import prune_blocks

        return prune_blocks(
            self.job.checkpoint,
            folder=folder,
            threads=self.threads,
            progress=progress,
            processes=self.processes,
            **given,
        )

    def follow(self) -> None:
        """Do this process's share of what the first one asks for, until it needs no more.

        Raises:
            ArtifactError: this process has another model, version or code.
        """
        for name, given in self.processes.jobs(self._same):
            if name == "prune":
                with scratch_folder(self.work, self.processes.rank) as scratch:
                    self._prune_blocks(scratch, given)
            else:
                self._serve(**given)

    def _serve(self, settings: EngineSettings, folder: Path, sha256: str) -> None:
        """Answer this process's shards, where it has the model; where any has not, the first one answers them all."""
        if sha256 == self.job.checkpoint.sha256:
            folder = self.job.model.folder
        has = (folder / "config.json").is_file() and Checkpoint(folder).sha256 == sha256
        if all(self.processes.all(has)):
            with open_engine("transformers", folder, settings) as engine:
                self.processes.serve(partial(_answer, engine))

    def _same(self, stage: str) -> dict[str, str]:
        """Return what the processes of a job must have in common."""
        return self._inputs(stage, _LIBRARIES) | {"model": self.job.checkpoint.sha256}

    def export(
        self,
        folder: Path,
        name: str,
        *,
        pruned: bool = True,
        importance: Path | None = None,
        quant: str = "",
    ) -> ExportResult:
        """Export a model folder, or find it exported.

        Args:
            folder: Hugging Face folder, dense or pruned.
            name: of the artifact, without suffix.
            pruned: whether packing applies; the dense model is always plain.
            importance: a pruned model whose statistic chooses the scales of this one too, so that both arms are
                quantized alike.
            quant: number format; empty takes the recipe's, with its choices for single tensors.
        """
        checkpoint, settings = Checkpoint(folder), self.job.recipe.export
        if quant:
            settings = settings.model_copy(update={"quant": quant, "tensors": {}})
        if not pruned:
            settings = settings.model_copy(update={"packing": "plain"})
        matrix = (
            Path(settings.importance)
            if settings.importance
            else (importance or folder) / IMPORTANCE_FILE
        )
        if (
            importance
            and matrix.is_file()
            and "importance" in exports.load(settings.format).OPTIONS
        ):
            settings = settings.model_copy(update={"importance": str(matrix)})
        metadata = self._metadata() if pruned else {}
        inputs = self._inputs("export") | {
            "model": checkpoint.sha256,
            "export": settings.model_dump(exclude={"importance"}),
            "importance": file_sha256(matrix) if matrix.is_file() else settings.importance,
            "name": name,
            "metadata": metadata,
        }
        stage = self._stage("export", inputs)
        if stage.finished:
            return ExportResult.from_json(stage.folder, stage.summary)

        def report(done: int, total: int) -> None:
            if self.progress:
                self.progress("export", done, total)

        path = exports.load(settings.format).artifact_path(name, settings.quant, settings.packing)
        result = exports.write(
            checkpoint, stage.folder / path, settings, metadata=metadata, progress=report
        )
        stage.finish(result.to_json(stage.folder))
        return result

    def rivals(
        self, model: PrunedModel, dense: ExportResult, pruned: ExportResult
    ) -> dict[str, ExportResult]:
        """Export the dense model in the quants that ``verify.controls`` asks for; by quant, in that order."""
        names: list[str] = []
        for asked in self.job.recipe.verify.controls:
            if asked == SAME_SIZE:
                shapes = {
                    source: self.job.checkpoint.entries[source].shape
                    for source in self.job.prunable_weights
                }
                sparsity = exports.measure_sparsity(pruned, shapes)
                names += same_size_quants(self.job.recipe.export, dense, pruned, shapes, sparsity)
            else:
                names.append(asked)
        return {
            name: self.export(
                self.job.model.folder,
                f"{self.job.model.name}-dense-{name}",
                pruned=False,
                importance=model.folder,
                quant=name,
            )
            for name in dict.fromkeys(names)
        }

    def _hold(
        self, model: PrunedModel, exported: Sequence[ExportResult], ids: Sequence[int]
    ) -> Held:
        """Stop the build at the first artifact that computes something else than the pruned checkpoint."""
        checkpoint = Checkpoint(model.folder)
        jobs = (self.job, *self.job.siblings)
        found = [
            hold(
                checkpoint, artifact, job.recipe.export, job.backend, job.encoder, ids, self.threads
            )
            for job, artifact in zip(jobs, exported, strict=True)
        ]
        return replace(found[0], notes=tuple(note for each in found for note in each.notes))

    @property
    def evaluation(self) -> Evaluation:
        """The comparison of what was built."""
        return Evaluation(self.job, self.work, self.threads, self.progress)

    def run(self, out: Path | None = None) -> tuple[Path, Report]:
        """Do everything and write the bundle.

        Args:
            out: its folder; None names it as the artifact, in the current folder.

        Returns:
            The bundle's folder, and its report.

        Raises:
            RacdeployError: the first thing that went wrong; no bundle is left then.
        """
        check_build(self.job, out)
        trace_folder, traces = self.traces()
        model = self.prune()
        dense = self.export(
            self.job.model.folder,
            f"{self.job.model.name}-dense-{self.job.recipe.export.quant}",
            pruned=False,
            importance=model.folder,
        )
        reached = [
            replace(self, job=job.at_sparsity(model.sparsity))
            for job in (self.job, *self.job.siblings)
        ]
        pruned, *also = (build.export(model.folder, name_artifact(build.job)) for build in reached)
        held = self._hold(model, (pruned, *also), traces[0].ids)
        report, records = self.evaluation.verify(
            model, dense, pruned, held, also, self.rivals(model, dense, pruned)
        )
        folder = out or Path(name_artifact(reached[0].job))
        bundling.write(
            folder,
            bundling.Contents(
                artifacts=[
                    bundling.Artifact(name_artifact(build.job), build.job.recipe.export, exported)
                    for build, exported in zip(reached, (pruned, *also), strict=True)
                ],
                model=self.job.model,
                checkpoint=self.job.checkpoint,
                recipe=self.job.recipe,
                traces=trace_counts(
                    traces, self.job.checkpoint, self.job.encoder, self.job.recipe.traces.identity
                )
                | {"sha256": TraceSet(trace_folder).sha256, "selection": model.selection},
                sparsity=model.sparsity,
                sparsity_asked=self.job.weigh_sparsity_asked(model.linears),
                undone=model.undone,
                report=report,
                records=records,
            ),
        )
        return folder, report

    @contextlib.contextmanager
    def _answering(
        self, context_tokens: int, folder: Path, checkpoint: Checkpoint
    ) -> Iterator[Answering]:
        """Yield what answers calibration prompts: a server that the recipe names, or the processes of this job.

        Those that cannot read a sparse model, which the first one wrote, leave it to answer alone.
        """
        settings = self.job.recipe.traces
        if self._served(checkpoint):
            with server.answering(
                settings, checkpoint, self.job.encoder, context_tokens, folder
            ) as answering:
                yield answering
            return
        engine_settings = EngineSettings(context_tokens, settings.batch, self.threads)
        place = checkpoint.folder.resolve()
        given = {"settings": engine_settings, "folder": place, "sha256": checkpoint.sha256}
        with open_engine("transformers", place, engine_settings) as engine:
            answer = partial(_answer, engine)
            with self.processes.job("traces", self._same("traces"), given):
                together = all(self.processes.all(True))
                if together:
                    yield Answering(partial(self.processes.each, answer), self.processes.count)
                    self.processes.tell(())
            if not together:
                yield Answering(lambda asked: [answer(each) for each in asked])

    def _served(self, checkpoint: Checkpoint) -> bool:
        """Return whether a server answers for a model: it has the dense one only."""
        return (
            bool(self.job.recipe.traces.server) and checkpoint.sha256 == self.job.checkpoint.sha256
        )

    def calibration(
        self, traces: Sequence[Trace]
    ) -> tuple[list[Trace], list[Trace], dict[str, Any]]:
        """Return calibration and held-out traces; prompts alone get as many tokens as whole traces would."""
        selection = select(traces, self.job.recipe.calibration)
        chosen = selection.calibration
        if self.job.recipe.calibration.source == "prompt":
            mean = sum(len(trace.prompt_ids) for trace in traces) / len(traces)
            count = math.ceil(1.1 * selection.tokens / mean)
            seed = self.job.recipe.traces.seed
            held = {trace.question for trace in selection.held_out}
            fresh = [
                p for p in self.job.tasks.draw("calibration", seed, count) if p.question not in held
            ]
            chosen = within_budget(prompt_traces(self.job.encoder, fresh), selection.tokens)
        counts = {
            "source": self.job.recipe.calibration.source,
            "calibration_traces": len(chosen),
            "calibration_tokens": sum(len(trace.ids) for trace in chosen),
            "rac_tokens": selection.tokens,
            "held_out_traces": len(selection.held_out),
            "tasks_not_held_out": sorted(
                {t.task for t in traces} - {t.task for t in selection.held_out}
            ),
            "left_out": selection.left_out,
        }
        return chosen, selection.held_out, counts

    def _metadata(self) -> dict[str, str | int | float | bool]:
        prune, model = self.job.recipe.prune, self.job.model
        return {
            **describe_origin(model, self.job.recipe),
            "general.name": name_model(self.job),
            "general.size_label": label_size(count_parameters(self.job.checkpoint)),
            "racdeploy.version": __version__,
            "racdeploy.base_model": self.job.recipe.model,
            "racdeploy.method": prune.method,
            "racdeploy.pattern": prune.pattern,
            "racdeploy.sparsity": float(prune.sparsity),
            "racdeploy.calibration": self.job.recipe.calibration.source,
        }

    def _stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return a stage's folder; what an interrupted run left beside it under other inputs is said on stderr."""
        stage = Stage.open(self.work, name, inputs)
        if stage.notice:
            _print_notice(stage.notice)
        return stage

    def _inputs(self, stage: str, libraries: Sequence[str] = ()) -> dict[str, Any]:
        return {"version": __version__, "code": code_hash(*_CODE[stage])} | {
            name: installed_version(name) for name in libraries
        }


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)


def _held_out_note(selection: Mapping[str, Any]) -> str:
    """Return which tasks have no error on held-out traces; empty where all have."""
    if not selection["tasks_not_held_out"]:
        return ""
    of = f" of {', '.join(selection['tasks_not_held_out'])}" if selection["held_out_traces"] else ""
    return f"no trace{of} is held out, so no error{of} was measured; raise traces.count or calibration.held_out_share"


def _answer(engine: Engine, asked: Asked) -> list[Completion]:
    return engine.generate(*asked)
