"""The evaluation of a build: all artifacts answer the same prompts, are measured, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.exporting import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.pipeline.answer_stage import answer_prompts
from racdeploy.pipeline.gates import GateResult
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.structure import measure_kept
from racdeploy.pipeline.thinking import (
    UNCONTROLLED,
    ShippedControl,
    list_dense_controls,
    note_control,
)
from racdeploy.pipeline.tokenization import compare_tokenization
from racdeploy.pipeline.workspace import Workspace
from racdeploy.pruning import PrunedModel
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification import measurements
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, TraceIds
from racdeploy.verification.checks import memory, speed
from racdeploy.verification.evidence import ArmResult, Evidence, LogitComparison, OtherArtifact
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.rivals import SAME_SIZE, note_missing_rivals
from racdeploy.verification.top_logits import compare_checkpoints

_ENOUGH_TOKENS = 0.98  # of the tokens that whole traces would have had


BEFORE_RECOVERY = "before recovery"
"""Name of the pruned model before its recovery."""


@dataclass(frozen=True)
class Rival:
    """A model to compare with; ``folder`` has its checkpoint, whose tokenizer encodes prompts.

    ``control`` is of a dense one.
    """

    name: str
    quant: str
    exported: ExportResult
    folder: Path
    control: ShippedControl = UNCONTROLLED


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a job's artifacts; ``work`` keeps answers, 0 threads are all cores.

    ``control`` is the thinking control that ships with the pruned model.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    control: ShippedControl = UNCONTROLLED

    def answer(
        self,
        exported: ExportResult,
        arm: str,
        folder: Path,
        control: ShippedControl = UNCONTROLLED,
        problems: Sequence[Problem] = (),
    ) -> SampledAnswers:
        """Answer the prompts with one artifact; repeat it if speed or memory have a limit.

        Prompts are those of the evaluation, or other ``problems``, encoded by the tokenizer in
        ``folder``.
        """
        job, settings = self.job, self._engine_settings
        encoder = PromptEncoder.from_folder(folder)
        sampler = AnswerSampler(
            encoder,
            find_tags(encoder),
            Checkpoint(folder).eos_ids,
            control.apply(job.recipe.verify),
            self.progress,
            control.settings,
        )

        # If speed or memory have a limit, both arms must be measured in one run.
        limits = [job.gate.limits(check.Limits).ratio for check in (speed, memory)]
        timed = not problems and limits != [None, None]

        return answer_prompts(
            Workspace(self.work),
            sampler,
            problems or job.problems("evaluation"),
            arm,
            exported.path,
            exported.files,
            job.backend,
            settings,
            measurements.fingerprint(settings),
            repeat_finished=timed,
        )

    def verify(
        self,
        model: PrunedModel,
        dense: ExportResult,
        pruned: ExportResult,
        gate_result: GateResult,
        also: Sequence[ExportResult] = (),
        rivals: Sequence[Rival] = (),
    ) -> tuple[Report, list[AnswerRecord]]:
        """Answer the evaluation prompts with every artifact, compare, and decide.

        ``pruned`` is for the recipe's target, ``also`` for the other targets in order; ``rivals``
        do not change the verdict.
        """
        recipe = self.job.recipe
        arms, traces, notes = self._answer_arms(model, dense, pruned, rivals)
        evidence = self._gather(model, pruned, arms, traces, gate_result, also)

        # Notes follow the order of the build: calibration, pruning, export, gates.
        built = [
            *_selection_notes(model.selection),
            *model.notes,
            *pruned.notes,
            *gate_result.notes,
        ]
        dense_rivals = [rival for rival in rivals if rival.name != BEFORE_RECOVERY]
        missing = note_missing_rivals(recipe.verify, len(dense_rivals))
        cut = self._vocabulary_notes(model, evidence.dense, evidence.logits)

        return build_report(
            evidence,
            [*self.job.input_notes, *built, *note_control(self.control), *cut, *notes, *missing],
            model=recipe.model,
            target=recipe.target,
            recipe=recipe.model_dump(mode="json"),
            linears=model.linears,
            blocks=model.blocks,
            structure=model.structure,
            deviations=pruned.deviations,
            kept_structure=measure_kept(self.job.checkpoint, model.checkpoint),
            recovery=model.recovery,
            fingerprint=measurements.fingerprint(self._engine_settings),
        )

    def _gather(
        self,
        model: PrunedModel,
        pruned: ExportResult,
        arms: Sequence[ArmResult],
        traces: Sequence[TraceIds],
        gate_result: GateResult,
        also: Sequence[ExportResult],
    ) -> Evidence:
        """Return the evidence for the checks; arms are in the order dense, pruned, rivals."""
        recipe = self.job.recipe
        dense_arm, pruned_arm, *others = arms
        form = exporting.load(recipe.export.format)
        metadata, _ = form.measure(pruned.path)
        prunable = set(map(generalize_expert, model.checkpoint.shape.prunable_weights))
        encoder = PromptEncoder.from_folder(model.folder)

        return Evidence(
            settings=recipe.verify,
            gate=self.job.gate,
            dense=dense_arm,
            pruned=pruned_arm,
            backend=self.job.backend,
            rivals=tuple(others),
            artifact=pruned.path,
            artifact_files=pruned.files,
            requested_sparsity=model.requested_sparsity,
            tensors=measurements.list_tensors(pruned.tensors),
            prunable=frozenset(t.name for t in pruned.tensors if t.source in prunable),
            dense_linears=frozenset(r.name for r in model.linears if r.requested_sparsity == 0),
            probes=gate_result.probes,
            token_differences=recipe.export.accept_token_differences,
            logits=self._compare_logits(model, pruned, traces),
            other_artifacts=self._answer_other_targets(model, also),
            prompts=measurements.probe_prompts(encoder, metadata, self._chat_ids(model.folder)),
            stop_ids=measurements.read_stop_ids(
                form.TOKENIZER_PREFIX, metadata, model.checkpoint.eos_ids
            ),
            packing=recipe.export.packing,
        )

    @property
    def _engine_settings(self) -> EngineSettings:
        settings = self.job.recipe.verify
        return EngineSettings(settings.context_tokens, settings.parallel, self.threads)

    def _answer_arms(
        self,
        model: PrunedModel,
        dense: ExportResult,
        pruned: ExportResult,
        rivals: Sequence[Rival],
    ) -> tuple[list[ArmResult], tuple[TraceIds, ...], list[str]]:
        """Return dense, pruned and rival arms, the dense traces, and notes on earlier answers."""
        job = self.job
        requests = [
            Rival("dense", job.reference_quant, dense, job.model.folder),
            Rival("pruned", job.recipe.export.quant, pruned, model.folder),
            *rivals,
        ]
        answered = [self._answer_as(rival) for rival in requests]

        if job.recipe.recover.shorten and SAME_SIZE in job.recipe.verify.controls:
            lengths = [
                [record.thinking_tokens for record in answers.records] for answers in answered[:2]
            ]
            words = job.recipe.runtime.thinking.hesitation
            controls = list_dense_controls(job.encoder, words, *lengths)
            for name, control in controls.items():
                requests.append(replace(requests[0], name=name, control=control))
                answered.append(self._answer_as(requests[-1]))

        # Speed of an earlier run is not compared with speed of this one.
        counted_before = all(answers.reused_stats for answers in answered)
        arms = []
        notes = []
        for rival, answers in zip(requests, answered, strict=True):
            stats = answers.reused_stats if counted_before else answers.stats
            arms.append(self._make_arm(rival.name, rival.quant, rival.exported, answers, stats))
            if answers.reused:
                measured = "; racdeploy bench measures speed"
                if counted_before:
                    measured = ", and so are speed and memory"
                notes.append(
                    f"{answers.reused} of {len(answers.records)} {rival.name} answers are of an "
                    f"earlier run on this machine, with the same artifact and settings{measured}"
                )

        return arms, answered[0].traces, notes

    def _answer_as(self, rival: Rival) -> SampledAnswers:
        """Answer with one arm; what was pruned has the control that ships."""
        control = rival.control if rival.name.startswith("dense") else self.control
        return self.answer(rival.exported, rival.name, rival.folder, control)

    def _answer_other_targets(
        self, model: PrunedModel, also: Sequence[ExportResult]
    ) -> tuple[OtherArtifact, ...]:
        """Answer with the artifacts of the other targets."""
        artifacts = []
        for job, exported in zip(self.job.siblings, also, strict=True):
            sibling = replace(self, job=job)
            name = f"pruned, {job.backend}"
            answers = sibling.answer(exported, name, model.folder, self.control)
            stats = answers.reused_stats or answers.stats
            arm = sibling._make_arm(name, job.recipe.export.quant, exported, answers, stats)
            artifacts.append(OtherArtifact(arm, job.backend, exported.path, exported.files))

        return tuple(artifacts)

    def _make_arm(
        self,
        name: str,
        quant: str,
        exported: ExportResult,
        answers: SampledAnswers,
        stats: Mapping[str, float],
    ) -> ArmResult:
        sparsity = exporting.measure_sparsity(exported, self.job.prunable_weights)
        known = (exported.size_bytes, quant, sparsity)
        return ArmResult(name, answers.records, *known, stats, exported.files, answers.kernels)

    def _compare_logits(
        self, model: PrunedModel, pruned: ExportResult, traces: Sequence[TraceIds]
    ) -> LogitComparison | None:
        """Compare both checkpoints under torch and the artifact on the dense model's traces."""
        exact = replace(self._engine_settings, parallel=1, cache_dtype="f32")
        return compare_checkpoints(
            lambda: open_engine("transformers", model.folder, exact),
            lambda: open_engine("transformers", self.job.model.folder, exact),
            lambda: open_engine(self.job.backend, pruned.path, exact),
            traces,
            self.job.find_old_ids(model.folder),
            self.progress,
        )

    def _vocabulary_notes(
        self, model: PrunedModel, dense: ArmResult, logits: LogitComparison | None
    ) -> list[str]:
        """Return notes on how a cut vocabulary changes the figures; none if all tokens are kept."""
        old_ids = self.job.find_old_ids(model.folder)
        if old_ids is None:
            return []

        # The choice of tokens did not see these texts.
        texts = [f"{record.thinking_text}\n{record.answer_text}" for record in dense.records]
        encoder = PromptEncoder.from_folder(model.folder)
        compared = compare_tokenization(self.job.encoder, encoder, old_ids, texts)

        count = min(self.job.recipe.verify.logit_traces, len(texts))
        return [compared.describe("the dense answers take"), *note_logits(logits, count)]

    def _chat_ids(self, folder: Path) -> dict[str, list[int]]:
        """Return a model's prompt ids by question, as transformers makes them."""
        from racdeploy.engines.backends.transformers import chat_prompt_ids

        questions = [problem.question for problem in self.job.problems("evaluation")]
        return dict(zip(questions, chat_prompt_ids(folder, questions), strict=True))


def note_logits(logits: LogitComparison | None, answers: int) -> list[str]:
    """Return notes on how a cut vocabulary changes the logits of the dense answers."""
    compared = logits.traces if logits else 0

    notes = []
    if logits:
        notes.append(
            f"the dense model gives {logits.lost_mass:.2g} of its probability to tokens that are "
            "gone; torch-dense is compared on the kept tokens"
        )
    if compared < answers:
        notes.append(
            f"{answers - compared} of {answers} dense answers have tokens that are gone: "
            "no logits were compared on them"
        )

    return notes


def _selection_notes(selection: Mapping[str, Any]) -> list[str]:
    """Return notes on the traces that calibrated, and on those that were left out."""
    tokens = selection["calibration_tokens"]
    unit = "prompts" if selection["source"] == "prompt" else "traces"
    note = f"calibrated on {tokens:,} tokens of {selection['calibration_traces']} {unit}"
    if selection["left_out"]:
        left_out = [f"{count} {reason}" for reason, count in selection["left_out"].items()]
        note += f"; left out: {', '.join(left_out)}"

    notes = [note]
    if tokens < _ENOUGH_TOKENS * selection["rac_tokens"]:
        notes.append(
            "the tasks ran out of prompts: whole traces would have had "
            f"{selection['rac_tokens']} tokens"
        )

    return notes
