"""The evaluation of a build: all artifacts answer the same prompts, are measured, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.exporting import ExportResult
from racdeploy.models.checkpoint import Checkpoint
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
from racdeploy.pruning import PrunedModel
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.pruning import CalibrationCounts
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem
from racdeploy.verification import measurements
from racdeploy.verification.answer_cache import AnswerCache
from racdeploy.verification.answer_sampler import SampledAnswers, TraceIds
from racdeploy.verification.checks import memory, speed
from racdeploy.verification.evidence import ArmResult, Evidence, LogitComparison
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.rivals import SAME_SIZE, note_missing_rivals
from racdeploy.verification.shipped_model import ShippedArtifact, ShippedModel
from racdeploy.verification.subject import Subject
from racdeploy.verification.top_logits import compare_checkpoints

_ENOUGH_TOKENS = 0.98  # of the tokens that whole traces would have had

BEFORE_RECOVERY = "before recovery"
"""Name of the pruned model before its recovery."""


@dataclass(frozen=True)
class ExportedArm:
    """An exported model; ``folder`` has its checkpoint, whose tokenizer encodes prompts.

    ``name`` is that of its arm.
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

    @cached_property
    def examiner(self) -> Examiner:
        """Asks the prompts of the evaluation; finished answers are reused."""
        job = self.job
        settings = job.verification
        # If speed or memory have a limit, both arms must be measured in one run.
        limits = [job.gate.limits(check.Limits).ratio for check in (speed, memory)]
        return Examiner(
            job.problems("evaluation"),
            settings,
            job.gate,
            AnswerCache(self.work, repeats_finished=limits != [None, None]),
            engine=EngineSettings(settings.context_tokens, settings.parallel, self.threads),
            progress=self.progress,
        )

    def answer(
        self, exported: ExportResult, arm: str, folder: Path, problems: Sequence[Problem] = ()
    ) -> SampledAnswers:
        """Answer prompts with one artifact, without control of its thinking.

        Args:
            folder: checkpoint whose tokenizer encodes the prompts.
            problems: in place of those of the evaluation.
        """
        examiner = self.examiner
        if problems:  # no figures are needed: finished answers are reused
            examiner = replace(examiner, cache=AnswerCache(self.work))
        _, answers = examiner.answer(self._make_subject(exported, folder), arm, problems)
        return answers

    def _make_arm_subject(self, asked: ExportedArm) -> Subject:
        """Return an exported model as it is asked."""
        exported = asked.exported
        return replace(
            self._make_subject(exported, asked.folder, asked.control),
            quant=asked.quant,
            sparsity=exporting.measure_sparsity(exported, self.job.prunable_weights),
        )

    def _make_subject(
        self, exported: ExportResult, folder: Path, control: ShippedControl = UNCONTROLLED
    ) -> Subject:
        encoder = PromptEncoder.from_folder(folder)
        return Subject(
            backend=self.job.backend,
            path=exported.path,
            files=exported.files,
            encoder=encoder,
            tags=find_tags(encoder),
            stop_ids=Checkpoint(folder).eos_ids,
            control=control.settings,
            max_thinking_tokens=control.max_tokens,
            size_bytes=exported.size_bytes,
        )

    def _ship(self, model: PrunedModel, exported: Sequence[ExportResult]) -> ShippedModel:
        """Return the pruned model as the bundle will have it.

        Args:
            exported: its artifacts, in the order of the job and its siblings.
        """
        checkpoint = model.checkpoint
        artifacts = []
        for job, result in zip((self.job, *self.job.siblings), exported, strict=True):
            subject = replace(self, job=job)._make_subject(result, model.folder, self.control)
            export = job.recipe.export
            artifact = ShippedArtifact(
                subject=replace(subject, quant=export.quant),
                family=checkpoint.family,
                format=export.format,
                packing=export.packing,
                exported={row.name: row for row in measurements.list_tensors(result.tensors)},
            )
            artifacts.append(artifact)

        return ShippedModel(
            artifacts=artifacts,
            prompt_ids=self._chat_ids(model.folder),
            eos_ids=checkpoint.eos_ids,
            requested_sparsity=model.requested_sparsity,
            linears=model.linears,
            token_differences=self.job.recipe.export.accept_token_differences,
        )

    def verify(
        self,
        model: PrunedModel,
        dense: ExportResult,
        pruned: ExportResult,
        gate_result: GateResult,
        also: Sequence[ExportResult] = (),
        rivals: Sequence[ExportedArm] = (),
    ) -> tuple[Report, list[AnswerRecord]]:
        """Answer the evaluation prompts with every artifact, compare, and decide.

        ``pruned`` is for the recipe's target, ``also`` for the other targets in order; ``rivals``
        do not change the verdict.
        """
        recipe = self.job.recipe
        shipped = self._ship(model, [pruned, *also])
        subject = shipped.main.measured()
        asked_dense = ExportedArm("dense", self.job.reference_quant, dense, self.job.model.folder)
        examiner = self._ask_until_clear(shipped, asked_dense)
        arms, traces, notes = self._answer_arms(examiner, subject, asked_dense, rivals)
        dense_arm, pruned_arm, *rival_arms = arms
        findings = replace(
            shipped.inspect(),
            probes=gate_result.probes,
            rivals=tuple(rival_arms),
            logits=self._compare_logits(model, pruned, traces),
            other_artifacts=tuple(other for other, _ in shipped.answer_others(examiner)),
        )
        evidence = examiner.weigh(subject, dense_arm, pruned_arm, findings)

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
            recipe=self.job.resolved_recipe.model_dump(mode="json"),
            linears=model.linears,
            blocks=model.blocks,
            structure=model.structure,
            deviations=pruned.deviations,
            kept_structure=measure_kept(self.job.checkpoint, model.checkpoint),
            recovery=model.recovery,
            fingerprint=self.examiner.fingerprint(),
        )

    def _ask_until_clear(self, shipped: ShippedModel, dense: ExportedArm) -> Examiner:
        """Ask both models until the verdict is clear; return the examiner of these prompts."""
        subject = self._make_arm_subject(dense)

        def weigh(examiner: Examiner) -> Evidence:
            arm, _ = examiner.answer(subject, dense.name)
            return shipped.weigh_interim(examiner, arm)

        return self.examiner.stop_when_clear(weigh)

    def _answer_arms(
        self,
        examiner: Examiner,
        shipped: Subject,
        dense: ExportedArm,
        rivals: Sequence[ExportedArm],
    ) -> tuple[list[ArmResult], tuple[TraceIds, ...], list[str]]:
        """Return dense, pruned and rival arms, the dense traces, and notes on earlier answers."""
        job = self.job

        def ask(arm: ExportedArm) -> tuple[ArmResult, SampledAnswers]:
            return examiner.answer(self._make_arm_subject(arm), arm.name)

        answered = [ask(dense), examiner.answer(shipped, "pruned")]
        for rival in rivals:
            # What was pruned has the control that ships.
            is_dense = rival.name.startswith("dense")
            answered.append(ask(rival if is_dense else replace(rival, control=self.control)))

        if job.recipe.recover.shorten and SAME_SIZE in job.recipe.verify.controls:
            lengths = []
            for arm, _ in answered[:2]:
                lengths.append([record.thinking_tokens for record in arm.records])
            words = job.recipe.runtime.thinking.hesitation
            controls = list_dense_controls(job.encoder, words, *lengths)
            for name, control in controls.items():
                answered.append(ask(replace(dense, name=name, control=control)))

        # Speed of an earlier run is not compared with speed of this one.
        counted_before = all(answers.reused_stats for _, answers in answered)
        arms = []
        notes = []
        for arm, answers in answered:
            arms.append(replace(arm, stats=answers.reused_stats) if counted_before else arm)
            if answers.reused:
                measured = "; racdeploy bench measures speed"
                if counted_before:
                    measured = ", and so are speed and memory"
                notes.append(
                    f"{answers.reused} of {len(answers.records)} {arm.name} answers are of an "
                    f"earlier run on this machine, with the same artifact and settings{measured}"
                )

        return arms, answered[0][1].traces, notes

    def _compare_logits(
        self, model: PrunedModel, pruned: ExportResult, traces: Sequence[TraceIds]
    ) -> LogitComparison | None:
        """Compare both checkpoints under torch and the artifact on the dense model's traces."""
        exact = replace(self.examiner.engine, parallel=1, cache_dtype="f32")
        return compare_checkpoints(
            lambda: open_engine("transformers", model.folder, exact),
            lambda: open_engine("transformers", self.job.model.folder, exact),
            lambda: open_engine(self.job.backend, pruned.path, exact),
            traces,
            old_ids=self.job.find_old_ids(model.folder),
            progress=self.progress,
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


def _selection_notes(counts: CalibrationCounts | None) -> list[str]:
    """Return notes on the traces that calibrated, and on those that were left out."""
    assert counts, "the model was pruned by this build"
    tokens = counts.calibration_tokens
    unit = "prompts" if counts.source == "prompt" else "traces"
    note = f"calibrated on {tokens:,} tokens of {counts.calibration_traces} {unit}"
    if counts.own_text_tokens:
        note += f", and on {counts.own_text_tokens:,} of text without a prompt"
    if counts.left_out:
        left_out = [f"{count} {reason}" for reason, count in counts.left_out.items()]
        note += f"; left out: {', '.join(left_out)}"

    notes = [note]
    if tokens < _ENOUGH_TOKENS * counts.rac_tokens:
        notes.append(
            f"the tasks ran out of prompts: whole traces would have had {counts.rac_tokens} tokens"
        )

    return notes
