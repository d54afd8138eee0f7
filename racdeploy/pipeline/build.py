"""The stages in order, and the only place that knows it: traces → prune → export → verify → bundle.

Every stage leaves a folder addressed by the hash of what decides its content, so that a finished
one is reused and an interrupted one is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import __version__
from racdeploy import export as exports
from racdeploy.export import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import bundling
from racdeploy.pipeline.comparison import Evaluation
from racdeploy.pipeline.export_stage import export_model
from racdeploy.pipeline.gates import Findings, check_artifact
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import (
    count_parameters,
    describe_origin,
    label_size,
    name_artifact,
    name_model,
)
from racdeploy.pipeline.preflight import check_build
from racdeploy.pipeline.prune_stage import PruneStage
from racdeploy.pipeline.trace_stage import TraceStage
from racdeploy.pipeline.workplace import Progress, Workplace
from racdeploy.prune import PrunedModel
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.report.model import Report
from racdeploy.traces.collect import trace_counts
from racdeploy.traces.trace import Trace, TraceSet
from racdeploy.verify.controls import SAME_SIZE, same_size_quants


@dataclass(frozen=True)
class Build:
    """A job on its way to a bundle.

    Args:
        job: what to do.
        work: where stage folders go.
        threads: CPU threads; 0 uses every core.
        progress: called with a label, units done and units in all.
        processes: who share traces and pruning; only the first one runs the stages, the others
            :meth:`follow` it.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: Processes = ALONE

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

        # A step of a schedule may have been undone: names say what was reached.
        jobs = [job.at_sparsity(model.sparsity) for job in (self.job, *self.job.siblings)]
        names = [name_artifact(job) for job in jobs]
        dense = self._export_dense(self.job.recipe.export.quant, model)
        pruned, *also = [
            replace(self, job=job).export(model.folder, name)
            for job, name in zip(jobs, names, strict=True)
        ]

        findings = self._check_artifacts(model, (pruned, *also), traces[0].ids)
        report, records = self.evaluation.verify(
            model, dense, pruned, findings, also, self.rivals(model, dense, pruned)
        )

        job, folder = self.job, out or Path(names[0])
        counts = trace_counts(traces, job.checkpoint, job.encoder, job.recipe.traces.identity)
        trace_set = {"sha256": TraceSet(trace_folder).sha256, "selection": model.selection}
        contents = bundling.Contents(
            artifacts=[
                bundling.Artifact(name, job.recipe.export, exported)
                for name, job, exported in zip(names, jobs, (pruned, *also), strict=True)
            ],
            model=job.model,
            checkpoint=job.checkpoint,
            recipe=job.recipe,
            traces=counts | trace_set,
            sparsity=model.sparsity,
            sparsity_asked=job.weigh_sparsity_asked(model.linears),
            undone=model.undone,
            report=report,
            records=records,
        )
        bundling.write(folder, contents)
        return folder, report

    def follow(self) -> None:
        """Do this process's share of what the first one asks for, until it needs no more.

        Raises:
            ArtifactError: this process has another model, version or code.
        """
        stages: dict[str, TraceStage | PruneStage]
        stages = {"traces": self.trace_stage, "prune": self.prune_stage}
        for name, given in self.processes.jobs(lambda name: stages[name].describe_code()):
            if name == "prune":
                self.prune_stage.share(given)
            else:
                self.trace_stage.serve(**given)

    def traces(self, sparse: Path | None = None) -> tuple[Path, list[Trace]]:
        """Collect a model's traces, or read them back; None asks the dense model."""
        return self.trace_stage.run(sparse)

    def prune(self) -> PrunedModel:
        """Prune the model on its traces, or find it pruned."""
        return self.prune_stage.run(self.traces)

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
            importance: a pruned model whose statistic chooses the scales of this one too, so that
                both arms are quantized alike.
            quant: number format; empty takes the recipe's, with its choices for single tensors.
        """
        settings = self.job.recipe.export
        if quant:
            settings = settings.model_copy(update={"quant": quant, "tensors": {}})
        if not pruned:
            settings = settings.model_copy(update={"packing": "plain"})

        metadata = self._metadata() if pruned else {}
        return export_model(self.place, folder, name, settings, metadata, importance)

    def rivals(
        self, model: PrunedModel, dense: ExportResult, pruned: ExportResult
    ) -> dict[str, ExportResult]:
        """Export the dense model in the quants that ``verify.controls`` asks for, in that order."""
        names: list[str] = []
        for asked in self.job.recipe.verify.controls:
            if asked == SAME_SIZE:
                entries = self.job.checkpoint.entries
                shapes = {name: entries[name].shape for name in self.job.prunable_weights}
                sparsity = exports.measure_sparsity(pruned, shapes)
                names += same_size_quants(self.job.recipe.export, dense, pruned, shapes, sparsity)
            else:
                names.append(asked)

        return {name: self._export_dense(name, model, asked=False) for name in dict.fromkeys(names)}

    @property
    def place(self) -> Workplace:
        """Where the stages are run."""
        return Workplace(self.work, self.threads, self.progress, self.processes)

    @property
    def trace_stage(self) -> TraceStage:
        """What collects the traces."""
        job = self.job
        return TraceStage(
            self.place, job.checkpoint, job.encoder, job.tags, job.tasks, job.recipe.traces
        )

    @property
    def prune_stage(self) -> PruneStage:
        """What prunes."""
        job, recipe = self.job, self.job.recipe
        return PruneStage(
            self.place,
            job.checkpoint,
            job.encoder,
            job.tasks,
            recipe.traces.seed,
            recipe.calibration,
            recipe.prune,
            job.joint_quant if recipe.prune.joint else "",
            lambda sparsity: name_model(job.at_sparsity(sparsity)),
        )

    @property
    def evaluation(self) -> Evaluation:
        """The comparison of what was built."""
        return Evaluation(self.job, self.work, self.threads, self.progress)

    def _export_dense(self, quant: str, model: PrunedModel, asked: bool = True) -> ExportResult:
        """Export the dense model; ``asked`` keeps the recipe's choices for single tensors."""
        dense = self.job.model
        return self.export(
            dense.folder,
            f"{dense.name}-dense-{quant}",
            pruned=False,
            importance=model.folder,
            quant="" if asked else quant,
        )

    def _check_artifacts(
        self, model: PrunedModel, exported: Sequence[ExportResult], ids: Sequence[int]
    ) -> Findings:
        """Stop the build at the first artifact that computes something else than its model."""
        checkpoint = Checkpoint(model.folder)
        jobs = (self.job, *self.job.siblings)
        found = [
            check_artifact(
                checkpoint, artifact, job.recipe.export, job.backend, job.encoder, ids, self.threads
            )
            for job, artifact in zip(jobs, exported, strict=True)
        ]
        return replace(found[0], notes=tuple(note for each in found for note in each.notes))

    def _metadata(self) -> dict[str, Any]:
        """Return the keys of a pruned file that say what it is and how it was made."""
        job, recipe = self.job, self.job.recipe
        return {
            **describe_origin(job.model, recipe),
            "general.name": name_model(job),
            "general.size_label": label_size(count_parameters(job.checkpoint)),
            "racdeploy.version": __version__,
            "racdeploy.base_model": recipe.model,
            "racdeploy.method": recipe.prune.method,
            "racdeploy.pattern": recipe.prune.pattern,
            "racdeploy.sparsity": float(recipe.prune.sparsity),
            "racdeploy.calibration": recipe.calibration.source,
        }
