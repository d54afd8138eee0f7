"""The build: traces, prune, recover, vocabulary, export, verify, bundle.

No other module knows the order of the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from racdeploy import exporting
from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.exporting import ExportResult
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.renumbering import map_new_ids, translate_ids
from racdeploy.pipeline import bundling
from racdeploy.pipeline.evaluation import BEFORE_RECOVERY, Evaluation, ExportedArm
from racdeploy.pipeline.export_stage import export_model
from racdeploy.pipeline.forecast import estimate_seconds, expect_answer_tokens
from racdeploy.pipeline.gates import GateResult, check_artifact
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import list_metadata, name_artifact, name_model
from racdeploy.pipeline.own_text_stage import OwnTextStage
from racdeploy.pipeline.phase_training import PhaseTrainer, TrainingRequest
from racdeploy.pipeline.preflight import check_build
from racdeploy.pipeline.prune_stage import PruneRequest, PruneStage
from racdeploy.pipeline.pruned_folder import read_pruned
from racdeploy.pipeline.recover_stage import RecoverStage
from racdeploy.pipeline.shorten_stage import ShortenedModel, ShortenStage
from racdeploy.pipeline.structure import fit_structure, plan_cut
from racdeploy.pipeline.thinking import read_control
from racdeploy.pipeline.trace_engine import TRACE_QUANT, TraceEngine, name_dense
from racdeploy.pipeline.trace_memory import TraceMemory
from racdeploy.pipeline.trace_stage import TraceRequest, TraceStage
from racdeploy.pipeline.vocabulary_stage import cut_vocabulary
from racdeploy.pipeline.workspace import Workspace, describe_code
from racdeploy.pruning import PrunedModel
from racdeploy.pruning.process_group import SINGLE_PROCESS, ProcessGroup
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.results.plan import Plan, PruningPlan, RecoveryPlan, TimePlan
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.collect import summarize_traces
from racdeploy.traces.trace import Trace, TraceSet, count_tokens
from racdeploy.verification.rivals import SAME_SIZE, find_same_size_quants

JobRequest = TraceRequest | PruneRequest | TrainingRequest | ShortenedModel
"""Request of the first process of a job to the others; a shortened model replaces the dense one."""


@dataclass(frozen=True)
class Build:
    """The build of a job's bundle, with stage folders in ``work``.

    If several processes share traces, pruning and recovery, the first one runs the stages, and the
    others :meth:`follow` it. ``progress`` is called with a label, units done and all units.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: ProcessGroup = SINGLE_PROCESS

    def __post_init__(self) -> None:
        """Fit the cut: every stage and name depends on it."""
        object.__setattr__(self, "job", fit_structure(self.job))

    def run(
        self, out: Path | None = None, extra_rivals: Sequence[ExportedArm] = ()
    ) -> tuple[Path, Report]:
        """Run all stages; return the bundle's folder and its report.

        Args:
            out: the bundle's folder; by default the artifact's name.
            extra_rivals: models to compare with, after those that the recipe names.
        """
        self.check(out)
        return self.write(self.make(extra_rivals), out)

    def check(self, out: Path | None = None) -> Plan:
        """Return the plan of the stages; raise the first error that one of them would raise."""
        plan = check_build(self.job, out, self.work)
        self._check_trace_memory()

        engine = self.trace_engine
        if plan.artifact and not (self.job.recipe.traces.server or engine.obstacle):
            plan = replace(plan, artifact=replace(plan.artifact, traces_from=engine.label))
        return plan

    def make(self, extra_rivals: Sequence[ExportedArm] = ()) -> bundling.BundleContents:
        """Run all stages up to the verification; return what the bundle will contain."""
        if (shorter := self.shorten()) is not self:
            return shorter.make(extra_rivals)
        self.plan_recovery()
        trace_folder, traces = self.traces()
        if (informed := self.with_answer_limit()) is not self:
            return informed.make(extra_rivals)
        job = self.job
        # One model for each artifact, since the codes of two number formats differ; one cut of all.
        builds = [self]
        for sibling in job.siblings:
            recipe = sibling.recipe.model_copy(update={"structure": job.structure})
            builds.append(replace(self, job=sibling.with_recipe(recipe)))
        models = [build.prune() for build in builds]
        model = models[0]
        dense = self._export_dense(model, job.reference_quant)

        artifacts = []
        for build, own in zip(builds, models, strict=True):
            artifacts.append(build._export_artifact(own))

        pruned, *also = exported = [artifact.result for artifact in artifacts]
        findings = self._check_artifacts(models, exported, traces[0].ids)
        findings = replace(findings, notes=(*self._note_traces(), *findings.notes))
        control = read_control(job, PromptEncoder.from_folder(model.folder))

        evaluation = replace(self.evaluation, control=control)
        rivals = [*self.rivals(model, dense, pruned), *extra_rivals]
        report, records = evaluation.verify(
            model, dense, pruned, findings, also=also, rivals=rivals
        )

        assert model.selection, "it was pruned here"
        selection = model.selection.model_dump()
        origin = {"sha256": TraceSet(trace_folder).sha256, "selection": selection}
        return bundling.BundleContents(
            artifacts,
            job,
            model,
            traces=self._describe_traces(traces) | origin,
            report=report,
            records=records,
            control=control,
        )

    def export_pruned(self) -> ExportResult:
        """Prune the model and export it; nothing is verified."""
        return self._export_artifact(self.prune()).result

    def _note_traces(self) -> list[str]:
        """Return notes on the length of answers, and on the engine that answered here."""
        notes = []
        if limit := self.trace_stage.find_limit():
            notes.append(limit.describe())
        if not self.job.recipe.traces.server:
            notes += self.trace_engine.list_notes(self.job.checkpoint)
        return notes

    def _describe_traces(self, traces: Sequence[Trace]) -> Json:
        """Return counts of the traces, and what has made them, for the manifest."""
        job = self.job
        sampling = job.recipe.traces.identity | {"max_new_tokens": job.trace_limit}
        counts = summarize_traces(traces, job.checkpoint, job.encoder, sampling)
        if not job.recipe.traces.server:
            counts |= self.trace_engine.describe(job.checkpoint)
        return counts

    def _export_artifact(self, model: PrunedModel) -> bundling.Artifact:
        """Export the pruned model, under a name that says what was done to it."""
        job = self.job
        # Training may have been undone as a whole: then names do not claim it.
        undone: Json = {} if model.before_recovery else {"tokens": 0}
        if job.checkpoint.folder == job.model.folder:
            undone["shorten"] = False

        named = job.with_recovery(**undone)
        name = name_artifact(named)
        result = replace(self, job=named).export(model.folder, name)
        return bundling.Artifact(name, named.recipe.export, result)

    def write(
        self, contents: bundling.BundleContents, out: Path | None = None
    ) -> tuple[Path, Report]:
        """Write a bundle; return its folder, by default the artifact's name, and its report."""
        folder = out or Path(contents.artifacts[0].name)
        self.workspace.report("bundle", 0, 1)
        bundling.write_bundle(folder, contents)
        self.workspace.report("bundle", 1, 1)
        return folder, contents.report

    def follow(self) -> None:
        """Do this process's share of the first one's jobs until they end."""
        build = self

        def describe(request: JobRequest) -> Mapping[str, str]:
            return describe_code(build._find_stage(request))

        for request in self.processes.receive_jobs(describe):
            if isinstance(request, TraceRequest):
                build.trace_stage.run_as_follower(request)
            elif isinstance(request, PruneRequest):
                build.prune_stage.run_as_follower(request)
            elif isinstance(request, TrainingRequest):
                build.recover_stage.trainer.run_as_follower(request)
            else:  # all later jobs have this model in place of the dense one
                build = build._with_shortened(request)

    def _find_stage(self, request: JobRequest) -> TraceStage | PruneStage | PhaseTrainer:
        """Return the stage of a request; a shortened model comes from the training."""
        if isinstance(request, TraceRequest):
            return self.trace_stage
        if isinstance(request, PruneRequest):
            return self.prune_stage
        return self.recover_stage.trainer

    def traces(self) -> tuple[Path, list[Trace]]:
        """Collect the dense model's traces, or read them back."""
        self._check_trace_memory()
        return self.trace_stage.run()

    def with_answer_limit(self) -> Build:
        """Return the build with the limit of answers that its traces have found; itself if none."""
        found = self.trace_stage.find_limit()
        if found is None or found.tokens == self.job.answer_limit:
            return self
        return replace(self, job=replace(self.job, answer_limit=found.tokens))

    def shorten(self) -> Build:
        """Return the build of the dense model that has learned to think less; itself if it has."""
        job = self.job
        settings = job.recipe.recover
        if not settings.shorten or job.shortened:
            return self
        self.plan_recovery()  # is there enough memory?

        prompts = len(job.problems("calibration"))

        def sample(folder: Path | None, asked: int) -> list[Trace]:
            _, answers = self._collect_traces(folder, asked, settings.samples)
            return answers

        stage = ShortenStage(
            self.recover_stage.trainer, job.encoder, prompts, f"{job.model.name}-shortened"
        )
        shortened = stage.run(sample)
        with self.workspace.announce(shortened, self.recover_stage.trainer):
            return self._with_shortened(shortened)

    def _with_shortened(self, model: ShortenedModel) -> Build:
        return replace(self, job=replace(self.job, resolved=self.job.model, shortened=model))

    def prune(self) -> PrunedModel:
        """Prune the model on its traces, recover it, and cut the vocabulary last."""
        if (shorter := self.shorten()) is not self:
            return shorter.prune()
        self.plan_recovery()
        choice = self.job.vocabulary
        if choice is None:
            return self._prune_and_recover()

        # Traces may need more tokens than the recipe keeps: refuse that before the long pruning.
        _, traces = self.traces()
        choice.choose(traces)

        model = self._prune_and_recover()
        return cut_vocabulary(self.workspace, choice, model, traces)

    def recover(self, folder: Path) -> PrunedModel:
        """Train the pruned model of a folder to match the dense one."""
        if not self.job.recipe.recover.tokens:
            raise UsageError(
                "nothing-to-learn",
                "recover.tokens is 0, so there is nothing to learn",
                remedy="--recover-tokens 1000000, or recover.tokens in the recipe",
            )

        model = read_pruned(self.job.checkpoint, folder)
        self.plan_recovery()
        return self._recover(model, f"{folder.name}-recovered")

    def plan_recovery(self) -> RecoveryPlan | None:
        """Return the plan of recovery, None if it is off; raise the errors that would stop it."""
        job, stage = self.job, self.recover_stage
        settings = stage.settings
        if not (settings.tokens or settings.shorten):
            return None

        longest = max(job.count_prompt_tokens("calibration")) + job.trace_limit
        if not settings.tokens:  # the whole model learns to think less
            whole = settings.model_copy(update={"methods": settings.methods or ("full",)})
            stage = replace(stage, settings=whole)
        plan = stage.plan(longest)
        if settings.shorten:
            answers = settings.samples * len(job.problems("calibration"))
            plan = replace(plan, shorten_answers_at_most=(settings.rounds + 1) * answers)
        return plan

    def _prune_and_recover(self) -> PrunedModel:
        stage = self.prune_stage
        if not self.job.recipe.recover.tokens:
            return self._run_prune(stage)

        # Codes are chosen last: recovery would move the weights away from those chosen here.
        model = self._run_prune(replace(stage, quants={}))
        name = name_model(self.job)
        recovered = self._recover(model, name)

        if recovered.before_recovery is None and stage.quants:
            return self._run_prune(stage)
        return recovered

    def _run_prune(self, stage: PruneStage) -> PrunedModel:
        folder, traces = self.traces()
        stage = replace(stage, own_text=self.own_text_stage.run())
        model = stage.run(traces, TraceSet(folder).sha256)
        if shortened := self.job.shortened:
            notes = (*shortened.notes, *model.notes)
            model = replace(model, recovery=shortened.rows, notes=notes)
        return model

    def _recover(self, model: PrunedModel, name: str) -> PrunedModel:
        """Recover a pruned model, then choose its codes if the recipe asks for it."""
        stage = replace(self.prune_stage, own_text=self.own_text_stage.run())
        choose_codes = stage.choose_codes if stage.quants else None
        return self.recover_stage.run(model, name, self._collect_traces, choose_codes)

    def _collect_traces(
        self, folder: Path | None, max_prompts: int, samples: int = 1
    ) -> tuple[Path, list[Trace]]:
        """Return traces of the dense model, or of a folder's model with the dense model's limit."""
        stage = self.trace_stage
        limit = stage.find_limit(samples=samples) if folder else None
        return stage.run(folder, max_prompts, samples, limit.tokens if limit else 0)

    def export(
        self,
        folder: Path,
        name: str,
        *,
        pruned: bool = True,
        importance: Path | None = None,
        quant: str = "",
    ) -> ExportResult:
        """Export a model folder, or return its earlier export.

        Args:
            pruned: True for the pruned model; the dense one is always stored plain.
            importance: file with the pruned model's statistic, for the scales of the dense one too,
                so that both are quantized alike.
            quant: number format; empty takes the recipe's, with its choices for single tensors.
        """
        settings = self.job.recipe.export
        if quant:
            settings = settings.model_copy(update={"quant": quant, "tensors": {}})
        if not pruned:
            settings = settings.model_copy(update={"packing": "plain"})

        metadata = list_metadata(self.job, Checkpoint(folder)) if pruned else {}
        return export_model(
            self.workspace,
            folder,
            name,
            settings,
            metadata=metadata,
            importance=importance,
            label="export" if pruned else "export dense",
        )

    def rivals(
        self, model: PrunedModel, dense: ExportResult, pruned: ExportResult
    ) -> list[ExportedArm]:
        """Export the dense model in the quants of ``verify.controls``, in that order.

        If recovery changed the pruned model, the model before it comes first.
        """
        job = self.job

        names = []
        for control in job.recipe.verify.controls:
            if control != SAME_SIZE:
                names.append(control)
                continue

            entries = job.checkpoint.entries
            shapes = {name: entries[name].shape for name in job.prunable_weights}
            sparsity = exporting.measure_sparsity(pruned, model.checkpoint.shape.prunable_weights)
            # The two dense quants nearest to the pruned file, whose size is known only now.
            names += find_same_size_quants(
                job.recipe.export,
                job.reference_quant,
                dense,
                pruned,
                shapes=shapes,
                sparsity=sparsity,
            )

        rivals = []
        if before := model.before_recovery:
            quant = job.recipe.export.quant
            exported = self.export(before, f"{before.name}-{quant}")
            rivals.append(ExportedArm(BEFORE_RECOVERY, quant, exported, before))

        for name in dict.fromkeys(names):
            exported = self._export_dense(model, name)
            rivals.append(ExportedArm(f"dense {name}", name, exported, job.model.folder))

        return rivals

    def plan(self, checked: Plan) -> Plan:
        """Return the results of the checks, and the cost of the stages up to recovery."""
        plan = replace(
            checked,
            trace_server_model=self.find_trace_server_model(),
            structure=plan_cut(self.job),
            pruning=self.plan_pruning(),
            recovery=self.plan_recovery(),
        )
        return replace(plan, time=self.plan_time(plan))

    def plan_pruning(self) -> PruningPlan:
        """Return pruning's tokens and peak memory.

        Tokens are those of the traces. If there are none yet, traces of maximum length count, and
        so does the memory for answering.
        """
        from racdeploy.pruning.memory_estimate import estimate_pruning_bytes

        job, settings = self.job, self.job.recipe
        checkpoint = job.checkpoint

        prompts = job.count_prompt_tokens("calibration")
        longest = [prompt + job.trace_limit for prompt in prompts]

        # Known traces give the tokens; before that, the plan has only an upper bound of them.
        traces = self.known_traces
        if traces:
            chosen = self.prune_stage.choose_traces(traces)
            tokens, held_out_tokens = count_tokens(chosen.fitted), count_tokens(chosen.held_out)
        else:
            longest = longest[: job.expect_trace_prompts(job.trace_limit)]
            held_out_count = round(settings.calibration.held_out_share * len(longest))
            held_out_tokens = sum(longest[:held_out_count])
            tokens = min(sum(longest), settings.calibration.max_tokens or sum(longest))
        tokens += settings.own_text_tokens

        tracing_bytes = None
        if not (traces or settings.traces.server):
            memory = self._plan_trace_memory()
            together = memory.fit_sequences(min(settings.traces.batch_size, len(prompts)))
            tracing_bytes = memory.estimate_bytes(together)

        counts = (tokens, held_out_tokens, job.rounding_quants)
        cuts = bool(settings.structure.keep)
        pruning_bytes = estimate_pruning_bytes(checkpoint, settings.prune, *counts, cuts=cuts)

        return PruningPlan(
            prune_tokens=tokens,
            prune_memory_bytes=pruning_bytes,
            is_bound=not traces,
            own_text_tokens=settings.own_text_tokens,
            asks=tuple(job.tasks.sources),
            trace_cuts=tuple(job.predict_truncation("calibration")),
            trace_memory_bytes_at_most=tracing_bytes,
        )

    def _check_trace_memory(self) -> None:
        """Refuse traces that take more memory than is free, unless they are there already."""
        stage = Stage.locate(self.work, "traces", self.trace_stage.inputs(self.job.checkpoint))
        if not (stage.is_finished or self.job.recipe.traces.server):
            self._plan_trace_memory().check()

    def _plan_trace_memory(self) -> TraceMemory:
        job = self.job
        longest = max(job.count_prompt_tokens("calibration"))
        context_tokens = longest + job.trace_limit + 1
        from_file = not self.trace_engine.obstacle
        return TraceMemory(job.checkpoint, longest, context_tokens, from_file)

    def plan_time(self, plan: Plan) -> TimePlan:
        """Return an estimate of the seconds of each stage, given the rest of the plan."""
        traces = self.known_traces
        seconds = estimate_seconds(self.job, plan, traces, self.threads)
        tokens = expect_answer_tokens(self.job, traces)
        return TimePlan(stage_seconds=seconds, answer_tokens=round(tokens))

    def find_trace_server_model(self) -> str:
        """Return the name of the trace server's model; raise an error if it cannot answer.

        Empty without a server, or if the traces were collected.
        """
        job = self.job
        settings = job.recipe.traces
        if not settings.server or self.known_traces:
            return ""

        from racdeploy.traces.server import find_served_model

        return find_served_model(settings, job.checkpoint, job.encoder)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.work, self.threads, self.progress, self.processes)

    @property
    def known_traces(self) -> list[Trace]:
        """Traces that an earlier run collected, or an empty list."""
        stage = Stage.locate(self.work, "traces", self.trace_stage.inputs(self.job.checkpoint))
        return TraceSet(stage.folder).read() if stage.is_finished else []

    @property
    def trace_stage(self) -> TraceStage:
        job, settings = self.job, self.job.recipe.traces
        if job.shortened and job.shortened.folder:  # a server has the model as it was
            settings = settings.model_copy(update={"server": ""})
        return TraceStage(
            self.workspace,
            dense=job.checkpoint,
            encoder=job.encoder,
            tags=job.tags,
            tasks=job.tasks,
            settings=settings,
            file_engine=self.trace_engine,
            fit_sequences=self._fit_sequences,
            context_limit=job.context_limit,
            may_never_end=bool(job.recipe.calibration.keep_truncated),
            enough_tokens=job.enough_trace_tokens,
        )

    @property
    def own_text_stage(self) -> OwnTextStage:
        return OwnTextStage(self.trace_stage, self.job.recipe.own_text_tokens)

    @cached_property
    def trace_engine(self) -> TraceEngine:
        """The engine that answers the calibration prompts from files."""
        return TraceEngine(self.workspace, self.job)

    def _fit_sequences(
        self, checkpoint: Checkpoint, prompt_tokens: int, context_tokens: int, from_file: bool
    ) -> int:
        """Return how many sequences of the traces are decoded together."""
        memory = TraceMemory(checkpoint, prompt_tokens, context_tokens, from_file)
        return memory.fit_sequences(self.job.recipe.traces.batch_size)

    @property
    def prune_stage(self) -> PruneStage:
        job, recipe = self.job, self.job.recipe
        return PruneStage(
            self.workspace,
            dense=job.checkpoint,
            encoder=job.encoder,
            tasks=job.tasks,
            trace_seed=recipe.traces.seed,
            calibration=recipe.calibration,
            structure=job.structure,
            settings=recipe.prune,
            quants=job.rounding_quants,
            name=name_model(job.with_recovery(tokens=0)),
        )

    @property
    def recover_stage(self) -> RecoverStage:
        job, recipe = self.job, self.job.recipe
        return RecoverStage(
            self.workspace,
            dense=job.checkpoint,
            encoder=job.encoder,
            settings=recipe.recover,
            calibration=recipe.calibration,
        )

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.job, self.work, self.threads, self.progress)

    def _export_dense(self, model: PrunedModel, quant: str) -> ExportResult:
        dense = self.job.model
        if quant == TRACE_QUANT and self.job.recipe.export.format == "gguf":
            # Its scales need no importance: it is the file that answered for the traces.
            return self.trace_engine.write_file(Checkpoint(dense.folder))

        name = name_dense(self.job, quant)
        dense_importance = model.folder / DENSE_IMPORTANCE_FILE
        matrix = dense_importance if dense_importance.is_file() else model.folder / IMPORTANCE_FILE
        return self.export(dense.folder, name, pruned=False, importance=matrix, quant=quant)

    def _check_artifacts(
        self, models: Sequence[PrunedModel], exported: Sequence[ExportResult], ids: Sequence[int]
    ) -> GateResult:
        """Check all artifacts; raises GateError for the first that differs from its model."""
        old_ids = self.job.find_old_ids(models[0].folder)
        if old_ids is not None:
            renumbered = translate_ids(ids, map_new_ids(old_ids))
            assert renumbered, "every token of the traces is kept"
            ids = renumbered

        results: list[GateResult] = []
        report = partial(self.workspace.report, "check files", total=len(exported))
        jobs = (self.job, *self.job.siblings)
        for job, model, artifact in zip(jobs, models, exported, strict=True):
            report(len(results))
            result = check_artifact(job, model.checkpoint, artifact, ids, threads=self.threads)
            results.append(result)
        report(len(results))

        return replace(results[0], notes=tuple(note for each in results for note in each.notes))
