"""The only place that knows the order of the stages: traces, prune, recover, vocabulary, export,
verify, bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from racdeploy import export as exports
from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.export import ExportResult
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.manifest import ThinkingControl
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import new_ids, translate
from racdeploy.pipeline import bundling
from racdeploy.pipeline.comparison import BEFORE, Evaluation, Rival
from racdeploy.pipeline.export_stage import export_model
from racdeploy.pipeline.forecast import estimate_seconds
from racdeploy.pipeline.gates import Findings, check_artifact
from racdeploy.pipeline.job import Job, fit_context
from racdeploy.pipeline.naming import describe_model, name_artifact, name_model
from racdeploy.pipeline.preflight import check_build
from racdeploy.pipeline.prune_stage import PruneStage
from racdeploy.pipeline.pruned_folder import read_pruned
from racdeploy.pipeline.recover_stage import RecoverStage
from racdeploy.pipeline.structure import fit_structure, plan_cut
from racdeploy.pipeline.thinking import Control, read_control, tune
from racdeploy.pipeline.trace_stage import TraceStage
from racdeploy.pipeline.vocabulary_stage import cut_vocabulary
from racdeploy.pipeline.workplace import Workplace
from racdeploy.prune import PrunedModel
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.results.answers import Record
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.collect import trace_counts
from racdeploy.traces.trace import Trace, TraceSet, count_tokens
from racdeploy.verify.controls import SAME_SIZE, same_size_quants


@dataclass(frozen=True)
class Build:
    """A job on its way to a bundle, with its stage folders in ``work``.

    Only the first of the processes that share traces, pruning and recovery runs the stages; the
    others :meth:`follow` it. ``progress`` is called with a label, units done and units in all.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        """Settle what is cut, and the context: every stage and name goes by them."""
        object.__setattr__(self, "job", fit_context(fit_structure(self.job)))

    def run(self, out: Path | None = None, beside: Sequence[Rival] = ()) -> tuple[Path, Report]:
        """Do everything; return the bundle's folder, by default the artifact's name, and report.

        Models ``beside`` answer too, after those that the recipe names.
        """
        check_build(self.job, out)
        self.plan_recovery()
        trace_folder, traces = self.traces()
        model = self.prune()

        # Phases may have been undone: names say what was reached.
        job = self.job
        jobs = [job, *job.siblings]
        if model.before_recovery is None:
            jobs = [each.unrecovered() for each in jobs]
        dense = self._export_dense(model)

        artifacts = []
        for each in jobs:
            name = name_artifact(each)
            exported = replace(self, job=each).export(model.folder, name)
            artifacts.append(bundling.Artifact(name, each.recipe.export, exported))

        pruned, *also = [artifact.result for artifact in artifacts]

        findings = self._check_artifacts(model, (pruned, *also), traces[0].ids)
        control = self._control(model, pruned)

        evaluation = replace(self.evaluation, control=control)
        rivals = [*self.rivals(model, dense, pruned), *beside]
        report, records = evaluation.verify(model, dense, pruned, findings, also, rivals)

        counts = trace_counts(traces, job.checkpoint, job.encoder, job.recipe.traces.identity)
        origin = {"sha256": TraceSet(trace_folder).sha256, "selection": model.selection}
        contents = bundling.Contents(
            artifacts, job, model, counts | origin, report, records, control
        )

        folder = out or Path(artifacts[0].name)
        self.place.report("bundle", 0, 1)
        bundling.write(folder, contents)
        self.place.report("bundle", 1, 1)
        return folder, report

    def follow(self) -> None:
        """Do this process's share of what the first one asks for, until it needs no more."""
        stages: dict[str, TraceStage | PruneStage | RecoverStage]
        stages = {
            "traces": self.trace_stage,
            "prune": self.prune_stage,
            "recover": self.recover_stage,
        }
        for name, given in self.processes.jobs(lambda name: stages[name].describe_code()):
            stages[name].share(given)

    def traces(self, sparse: Path | None = None, first: int = 0) -> tuple[Path, list[Trace]]:
        """Collect a model's traces, or read them back; None asks the dense model, 0 for all."""
        return self.trace_stage.run(sparse, first)

    def prune(self) -> PrunedModel:
        """Prune the model on its traces; the vocabulary is cut last, of what is left."""
        self.plan_recovery()
        choice = self.job.vocabulary
        if choice is None:
            return self._prune_and_recover()

        # What the traces need may be more than was asked for: that is said before the long walk.
        _, traces = self.traces()
        choice.choose(traces)

        model = self._prune_and_recover()
        return cut_vocabulary(self.place, choice, model, traces)

    def recover(self, folder: Path) -> PrunedModel:
        """Let the pruned model of a folder learn from the dense one."""
        if not self.job.recipe.recover.tokens:
            raise UsageError(
                "nothing-to-learn",
                "there is nothing to learn at 0 tokens",
                remedy="--recover-tokens 1000000, or recover.tokens in the recipe",
            )

        model = read_pruned(self.job.checkpoint, folder)
        self.plan_recovery()
        return self._recover(model, f"{folder.name}-recovered")

    def plan_recovery(self) -> Json:
        """Return what recovery takes, or raise what would stop it; nothing where it is off."""
        settings = self.job.recipe
        if not settings.recover.tokens:
            return {}

        questions = [each.question for each in self.job.problems("calibration")]
        longest = max(len(self.job.encoder.encode(question)) for question in questions)
        return self.recover_stage.plan(longest + settings.traces.max_new_tokens)

    def _prune_and_recover(self) -> PrunedModel:
        if not self.job.recipe.recover.tokens:
            return self._run_prune(self.prune_stage)

        # Codes are chosen last: recovery would move the weights away from those chosen here.
        settings = self.prune_stage.settings.model_copy(update={"joint": False})
        uncoded = replace(self.prune_stage, quant="", settings=settings)
        model = self._run_prune(uncoded)
        name = name_model(self.job)
        recovered = self._recover(model, name)

        if recovered.before_recovery is None and self.job.recipe.prune.joint:
            return self._run_prune(self.prune_stage)
        return recovered

    def _run_prune(self, stage: PruneStage) -> PrunedModel:
        folder, traces = self.traces()
        return stage.run(traces, TraceSet(folder).sha256)

    def _recover(self, model: PrunedModel, name: str) -> PrunedModel:
        """Let a pruned model learn, and choose the codes that are asked for once it has."""
        choose_codes = self.prune_stage.choose_codes if self.job.recipe.prune.joint else None
        return self.recover_stage.run(model, name, self.traces, choose_codes)

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
            pruned: whether packing applies; the dense model is always plain.
            importance: file of a pruned model's statistic that chooses the scales of this one too,
                so that both arms are quantized alike.
            quant: number format; empty takes the recipe's, with its choices for single tensors.
        """
        settings = self.job.recipe.export
        if quant:
            settings = settings.model_copy(update={"quant": quant, "tensors": {}})
        if not pruned:
            settings = settings.model_copy(update={"packing": "plain"})

        metadata = describe_model(self.job, Checkpoint(folder)) if pruned else {}
        label = "export" if pruned else "export dense"
        return export_model(self.place, folder, name, settings, metadata, importance, label)

    def rivals(self, model: PrunedModel, dense: ExportResult, pruned: ExportResult) -> list[Rival]:
        """Export the dense model in the quants that ``verify.controls`` asks for, in that order.

        Where recovery changed the pruned model, the one before comes first.
        """
        job = self.job

        names: list[str] = []
        for asked in job.recipe.verify.controls:
            if asked != SAME_SIZE:
                names.append(asked)
                continue

            entries = job.checkpoint.entries
            shapes = {name: entries[name].shape for name in job.prunable_weights}
            sparsity = exports.measure_sparsity(pruned, model.checkpoint.shape.linear_weights)
            names += same_size_quants(job.recipe.export, dense, pruned, shapes, sparsity)

        rivals = []
        if before := model.before_recovery:
            quant = job.recipe.export.quant
            exported = self.export(before, f"{before.name}-{quant}")
            rivals.append(Rival(BEFORE, quant, exported, before))

        for name in dict.fromkeys(names):
            exported = self._export_dense(model, name)
            rivals.append(Rival(f"dense {name}", name, exported, job.model.folder))

        return rivals

    def plan(self, checked: Mapping[str, Any]) -> Json:
        """Return what was checked, and what the stages up to recovery take."""
        plan = {**checked, **self.plan_traces(), **self.plan_pruning()}
        return plan | self.plan_time(plan)

    def plan_pruning(self) -> Json:
        """Return what a cut leaves, and what pruning takes: tokens, peak memory, time if known.

        Tokens are of the traces, or of the longest there can be; without any, answering counts too.
        """
        from racdeploy.prune.cost import peak_bytes, trace_bytes

        job, settings = self.job, self.job.recipe
        checkpoint = job.checkpoint

        prompts = [len(job.encoder.encode(each.question)) for each in job.problems("calibration")]
        longest = [prompt + settings.traces.max_new_tokens for prompt in prompts]
        plan = plan_cut(job)
        if job.tasks.sources:
            plan["asks"] = [*job.tasks.sources]
        if foreseen := job.foresee_cuts("calibration"):
            plan["trace_cuts"] = foreseen

        stage = self._traces_stage
        if stage.finished:
            calibration, held_out, _ = self.prune_stage.select(TraceSet(stage.folder).read())
            tokens, held_out_tokens = count_tokens(calibration), count_tokens(held_out)
            bound = ""
        else:
            held_out_count = round(settings.calibration.held_out_share * len(longest))
            tokens, held_out_tokens = sum(longest), sum(longest[:held_out_count])
            bound = "_at_most"

        if not (stage.finished or settings.traces.server):
            together = min(settings.traces.batch, len(prompts))
            plan["trace_memory_bytes_at_most"] = trace_bytes(
                checkpoint, together, max(prompts), max(longest)
            )

        counts = (tokens, held_out_tokens, job.joint_quant)
        cuts = bool(settings.structure.keep)
        memory = peak_bytes(checkpoint, settings.prune, *counts, cuts=cuts)

        return plan | {
            f"prune_tokens{bound}": tokens,
            f"prune_memory_bytes{bound}": memory,
            **self.plan_recovery(),
        }

    def plan_time(self, plan: Mapping[str, Any]) -> Json:
        """Return about how many seconds all stages take, given the plan of all else."""
        stage = self._traces_stage
        traces = TraceSet(stage.folder).read() if stage.finished else []
        return {"seconds_expected": estimate_seconds(self.job, plan, traces, self.threads)}

    def plan_traces(self) -> Json:
        """Return which model the trace server has, or raise why it can't answer; nothing else."""
        job = self.job
        settings = job.recipe.traces
        if not settings.server or self._traces_stage.finished:
            return {}

        from racdeploy.traces.server import find_model

        return {"trace_server_model": find_model(settings, job.checkpoint, job.encoder)}

    @property
    def place(self) -> Workplace:
        return Workplace(self.work, self.threads, self.progress, self.processes)

    @property
    def _traces_stage(self) -> Stage:
        return Stage.at(self.work, "traces", self.trace_stage.inputs(self.job.checkpoint))

    @property
    def trace_stage(self) -> TraceStage:
        job = self.job
        return TraceStage(
            self.place, job.checkpoint, job.encoder, job.tags, job.tasks, job.recipe.traces
        )

    @property
    def prune_stage(self) -> PruneStage:
        job, recipe = self.job, self.job.recipe
        return PruneStage(
            self.place,
            job.checkpoint,
            job.encoder,
            job.tasks,
            recipe.traces.seed,
            recipe.calibration,
            job.structure,
            recipe.prune,
            job.joint_quant,
            name_model(job.unrecovered()),
        )

    @property
    def recover_stage(self) -> RecoverStage:
        job, recipe = self.job, self.job.recipe
        return RecoverStage(
            self.place,
            job.checkpoint,
            job.encoder,
            recipe.recover,
            recipe.calibration,
            job.joint_quant,
        )

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.job, self.work, self.threads, self.progress)

    def _control(self, model: PrunedModel, pruned: ExportResult) -> Control:
        """Return what is done about the pruned model's thinking, tuned where that is asked for."""
        encoder = PromptEncoder.from_folder(model.folder)
        control = read_control(self.job, encoder)
        if not self.job.recipe.runtime.thinking.tune:
            return control

        def answer(settings: ThinkingControl) -> Sequence[Record]:
            tried = replace(control, settings=settings)
            arm = f"penalty {settings.hesitation_penalty:g}"
            found = self.evaluation.answer(pruned, arm, model.folder, tried, "calibration")
            return found.records

        return tune(control, answer, self.job)

    def _export_dense(self, model: PrunedModel, quant: str = "") -> ExportResult:
        dense, own_quant = self.job.model, self.job.recipe.export.quant
        name = f"{dense.name}-dense-{quant or own_quant}"
        own = model.folder / DENSE_IMPORTANCE_FILE
        matrix = own if own.is_file() else model.folder / IMPORTANCE_FILE
        return self.export(dense.folder, name, pruned=False, importance=matrix, quant=quant)

    def _check_artifacts(
        self, model: PrunedModel, exported: Sequence[ExportResult], ids: Sequence[int]
    ) -> Findings:
        """Stop the build at the first artifact that computes something else than its model."""
        old_ids = self.job.renumbering(model.folder)
        if old_ids is not None:
            renumbered = translate(ids, new_ids(old_ids))
            assert renumbered, "every token of the traces stays"
            ids = renumbered

        found: list[Findings] = []
        report = partial(self.place.report, "check files", total=len(exported))
        for job, artifact in zip((self.job, *self.job.siblings), exported, strict=True):
            report(len(found))
            found.append(check_artifact(job, model.checkpoint, artifact, ids, self.threads))
        report(len(found))

        return replace(found[0], notes=tuple(note for each in found for note in each.notes))
