"""The verification of a build: all artifacts answer the same prompts, are measured, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy import export as exports
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.export import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize
from racdeploy.pipeline.answer_stage import answer_prompts
from racdeploy.pipeline.gates import Findings
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.segmentation import compare_segmentation
from racdeploy.pipeline.structure import measure_kept
from racdeploy.pipeline.thinking import UNCONTROLLED, Control, note_control
from racdeploy.pipeline.workplace import Workplace
from racdeploy.prune import PrunedModel
from racdeploy.results.answers import Record
from racdeploy.results.pruning import DeviationRow
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.tasks import Problem, Split
from racdeploy.verify import measure
from racdeploy.verify.answers import Answers, IdPair, Respondent
from racdeploy.verify.checks import memory, speed
from racdeploy.verify.conclude import conclude
from racdeploy.verify.controls import control_notes
from racdeploy.verify.evidence import Arm, Evidence, LogitComparison, OtherArtifact

_NEARLY_ALL = 0.98  # of the tokens that whole traces would have been


BEFORE = "before recovery"
"""Name of the pruned model as it was before it learned from the dense one."""


@dataclass(frozen=True)
class Rival:
    """A model that answers too; ``folder`` has its checkpoint, whose tokenizer writes prompts."""

    name: str
    quant: str
    exported: ExportResult
    folder: Path


@dataclass(frozen=True)
class Evaluation:
    """A job whose artifacts are compared; ``work`` keeps answers, 0 threads are every core.

    ``control`` is of the pruned model's thinking, which ships with it.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Progress | None = None
    control: Control = UNCONTROLLED

    def answer(
        self,
        exported: ExportResult,
        arm: str,
        folder: Path,
        control: Control = UNCONTROLLED,
        split: Split = "evaluation",
        problems: Sequence[Problem] = (),
    ) -> Answers:
        """Answer the prompts with one artifact, again where speed or memory have a limit.

        Prompts are those of a ``split``, or other ``problems``, and are written by the tokenizer of
        a model's ``folder``.
        """
        job, settings = self.job, self._engine_settings
        encoder = PromptEncoder.from_folder(folder)
        respondent = Respondent(
            encoder,
            find_tags(encoder),
            Checkpoint(folder).eos_ids,
            control.apply(job.recipe.verify),
            self.progress,
            control.settings,
        )

        # Speed and memory of both arms have to come from one run, where they have a limit.
        limits = [job.gate.limits(check.Limits).ratio for check in (speed, memory)]
        timed = split == "evaluation" and not problems and limits != [None, None]

        return answer_prompts(
            Workplace(self.work),
            respondent,
            problems or job.problems(split),
            arm,
            exported.path,
            exported.files,
            job.backend,
            settings,
            measure.fingerprint(settings),
            again=timed,
        )

    def verify(
        self,
        model: PrunedModel,
        dense: ExportResult,
        pruned: ExportResult,
        found: Findings,
        also: Sequence[ExportResult] = (),
        rivals: Sequence[Rival] = (),
    ) -> tuple[Report, list[Record]]:
        """Rerun the evaluation prompts on every artifact, compare, and decide.

        ``pruned`` is for the recipe's target, ``also`` for others in order; ``rivals`` decide
        nothing.
        """
        recipe = self.job.recipe
        arms, traces, notes = self._answer_arms(model, dense, pruned, rivals)
        evidence = self._gather(model, pruned, arms, traces, found, also)

        built = [*_selection_notes(model.selection), *model.notes, *pruned.notes, *found.notes]
        dense_rivals = [rival for rival in rivals if rival.name != BEFORE]
        missing = control_notes(recipe.verify, len(dense_rivals))
        cut = self._vocabulary_notes(model, evidence.dense, evidence.logits)

        return conclude(
            evidence,
            [*self.job.hints, *built, *note_control(self.control), *cut, *notes, *missing],
            model=recipe.model,
            target=recipe.target,
            recipe=recipe,
            linears=model.linears,
            blocks=model.blocks,
            structure=model.structure,
            deviations=[DeviationRow(**asdict(each)) for each in pruned.deviations],
            kept=measure_kept(self.job.checkpoint, model.checkpoint),
            recovery=model.recovery,
            fingerprint=measure.fingerprint(self._engine_settings),
        )

    def _gather(
        self,
        model: PrunedModel,
        pruned: ExportResult,
        arms: Sequence[Arm],
        traces: Sequence[IdPair],
        found: Findings,
        also: Sequence[ExportResult],
    ) -> Evidence:
        """Return what the checks look at, of arms in the order dense, pruned, rivals."""
        recipe = self.job.recipe
        dense_arm, pruned_arm, *others = arms
        form = exports.load(recipe.export.format)
        metadata, _ = form.measure(pruned.path)
        prunable = set(map(generalize, model.checkpoint.shape.linear_weights))
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
            sparsity_asked=model.sparsity_asked,
            tensors=measure.list_tensors(pruned.tensors),
            prunable=frozenset(t.name for t in pruned.tensors if t.source in prunable),
            dense_linears=frozenset(r.name for r in model.linears if r.sparsity_asked == 0),
            probes=found.probes,
            token_differences=recipe.export.accept_token_differences,
            logits=self._compare_logits(model, pruned, traces),
            also=self._answer_also(model, also),
            prompts=measure.probe_prompts(encoder, metadata, self._chat_ids(model.folder)),
            stop_ids=measure.read_stop_ids(
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
    ) -> tuple[list[Arm], tuple[IdPair, ...], list[str]]:
        """Return dense, pruned and rival arms, the dense traces, and notes on earlier answers."""
        quant = self.job.recipe.export.quant
        original = self.job.model.folder
        asked = [
            Rival("dense", quant, dense, original),
            Rival("pruned", quant, pruned, model.folder),
            *rivals,
        ]

        found = []
        for one in asked:
            control = UNCONTROLLED if one.name.startswith("dense") else self.control
            found.append(self.answer(one.exported, one.name, one.folder, control))

        # Figures of then and of now are not put beside each other.
        counted_before = all(answers.earlier_stats for answers in found)
        arms = []
        notes = []

        for one, answers in zip(asked, found, strict=True):
            stats = answers.earlier_stats if counted_before else answers.stats
            arms.append(self._make_arm(one.name, one.quant, one.exported, answers, stats))
            if answers.earlier:
                notes.append(_note_earlier(one.name, answers, counted_before))

        return arms, found[0].traces, notes

    def _answer_also(
        self, model: PrunedModel, also: Sequence[ExportResult]
    ) -> tuple[OtherArtifact, ...]:
        """Answer with the artifacts of the further targets."""
        found = []
        for job, exported in zip(self.job.siblings, also, strict=True):
            sibling = replace(self, job=job)
            name = f"pruned, {job.backend}"
            answers = sibling.answer(exported, name, model.folder, self.control)
            stats = answers.earlier_stats or answers.stats
            arm = sibling._make_arm(name, job.recipe.export.quant, exported, answers, stats)
            found.append(OtherArtifact(arm, job.backend, exported.path, exported.files))

        return tuple(found)

    def _make_arm(
        self,
        name: str,
        quant: str,
        exported: ExportResult,
        answers: Answers,
        stats: Mapping[str, float],
    ) -> Arm:
        sparsity = exports.measure_sparsity(exported, self.job.prunable_weights)
        known = (exported.size_bytes, quant, sparsity)
        return Arm(name, answers.records, *known, stats, exported.files, answers.kernels)

    def _compare_logits(
        self, model: PrunedModel, pruned: ExportResult, traces: Sequence[IdPair]
    ) -> LogitComparison | None:
        """Compare both checkpoints under torch and the artifact on the dense model's traces."""
        exact = replace(self._engine_settings, parallel=1, cache_dtype="f32")
        return measure.compare_logits(
            lambda: open_engine("transformers", model.folder, exact),
            lambda: open_engine("transformers", self.job.model.folder, exact),
            lambda: open_engine(self.job.backend, pruned.path, exact),
            traces[: self.job.recipe.verify.logit_traces],
            self.job.renumbering(model.folder),
            self.progress,
        )

    def _vocabulary_notes(
        self, model: PrunedModel, dense: Arm, logits: LogitComparison | None
    ) -> list[str]:
        """Return what a cut vocabulary means for the figures; nothing where all tokens stay."""
        old_ids = self.job.renumbering(model.folder)
        if old_ids is None:
            return []

        # No token was chosen for these texts.
        texts = [f"{record.thinking_text}\n{record.answer_text}" for record in dense.records]
        encoder = PromptEncoder.from_folder(model.folder)
        found = compare_segmentation(self.job.encoder, encoder, old_ids, texts)

        asked = min(self.job.recipe.verify.logit_traces, len(texts))
        return [found.describe("the dense answers take"), *note_logits(logits, asked)]

    def _chat_ids(self, folder: Path) -> dict[str, list[int]]:
        """Return a model's prompt ids by question, as transformers makes them."""
        from racdeploy.engines.backends.transformers import chat_ids

        questions = [problem.question for problem in self.job.problems("evaluation")]
        return dict(zip(questions, chat_ids(folder, questions), strict=True))


def note_logits(found: LogitComparison | None, asked: int) -> list[str]:
    """Return what a cut vocabulary means for the logits; ``asked`` answers were to be compared."""
    compared = found.traces if found else 0

    notes = []
    if found:
        notes.append(
            f"the dense model gives {found.lost_mass:.2g} of its probability to tokens that are "
            "gone; torch-dense is compared on those that stay"
        )
    if compared < asked:
        notes.append(
            f"{asked - compared} of {asked} dense answers have tokens that are gone: "
            "no logits were compared on them"
        )

    return notes


def _note_earlier(name: str, answers: Answers, counted_before: bool) -> str:
    """Return what a reader must know of answers, and of figures, that are of an earlier run."""
    note = (
        f"{answers.earlier} of {len(answers.records)} {name} answers are of an earlier "
        "run on this machine, with the same artifact and settings"
    )
    if counted_before:
        return f"{note}, and so are speed and memory"
    return f"{note}; racdeploy bench measures speed"


def _selection_notes(selection: Mapping[str, Any]) -> list[str]:
    tokens = selection["calibration_tokens"]
    unit = "prompts" if selection["source"] == "prompt" else "traces"
    note = f"calibrated on {tokens:,} tokens of {selection['calibration_traces']} {unit}"
    if selection["left_out"]:
        left_out = [f"{count} {reason}" for reason, count in selection["left_out"].items()]
        note += f"; left out: {', '.join(left_out)}"

    notes = [note]
    if tokens < _NEARLY_ALL * selection["rac_tokens"]:
        notes.append(
            "the tasks ran out of prompts: whole traces would have been "
            f"{selection['rac_tokens']} tokens"
        )

    return notes
