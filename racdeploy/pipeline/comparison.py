"""The verification of a build: all artifacts answer the same prompts, what the checks need is measured, they decide.

Answers are kept as they come, under the hash of what decides them, so that an interrupted verification goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from racdeploy import __version__
from racdeploy import export as exports
from racdeploy.decoding.completion_log import CompletionLog
from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines import open_engine
from racdeploy.export import ExportResult
from racdeploy.pipeline.gates import Held
from racdeploy.pipeline.job import Job
from racdeploy.prune import PrunedModel
from racdeploy.report.model import Record, Report
from racdeploy.storage.addresses import code_hash
from racdeploy.storage.stages import Stage
from racdeploy.verify.answers import Answers, Respondent, identity
from racdeploy.verify.checks import memory, speed
from racdeploy.verify.controls import control_notes
from racdeploy.verify.evidence import Arm, Evidence, OtherArtifact, run_checks
from racdeploy.verify.measure import compare_logits, fingerprint, probe_prompts, stop_ids_of
from racdeploy.verify.summary import summarize, tensor_rows

_CODE = ("racdeploy.verify.answers",)


@dataclass(frozen=True)
class Verification:
    """A job whose artifacts are to be compared.

    Args:
        job: what was built.
        work: where answers go.
        threads: CPU threads; 0 uses every core.
        progress: called with a label, prompts done and prompts in all.
    """

    job: Job
    work: Path
    threads: int = 0
    progress: Callable[[str, int, int], None] | None = None

    def answer(self, exported: ExportResult, arm: str, settings: EngineSettings) -> Answers:
        """Answer the evaluation prompts with one artifact on its engine.

        Answers of an earlier run count, and an interrupted one goes on; where speed or memory have a limit, both arms
        answer in one run.
        """
        respondent = Respondent(
            self.job.encoder,
            self.job.tags,
            self.job.checkpoint.eos_ids,
            self.job.recipe.verify,
            self.progress,
        )
        inputs = identity(exported.files, self.job.recipe.verify, settings, fingerprint(settings))
        stage = Stage.open(
            self.work, "answers", {"version": __version__, "code": code_hash(*_CODE)} | inputs
        )
        file = stage.folder / "completions.jsonl"
        if stage.finished and self._timed():
            file.unlink(missing_ok=True)
        answers = respondent.answer(
            lambda: open_engine(self.job.backend, exported.path, settings),
            self.job.problems("evaluation"),
            arm,
            CompletionLog(file),
        )
        stage.finish({"answers": len(answers.records)})
        return answers

    def verify(
        self,
        model: PrunedModel,
        dense: ExportResult,
        pruned: ExportResult,
        held: Held,
        also: Sequence[ExportResult] = (),
        rivals: Mapping[str, ExportResult] | None = None,
    ) -> tuple[Report, list[Record]]:
        """Rerun the evaluation prompts on every artifact, compare, and decide.

        Args:
            model: the pruned model under torch.
            dense: the dense artifact.
            pruned: the pruned one for the recipe's target.
            held: what the gates found of the pruned artifacts.
            also: the pruned artifacts for the other targets, in their order.
            rivals: dense artifacts in other quants, which answer too and decide nothing.
        """
        settings = self.job.recipe.verify
        engine_settings = EngineSettings(settings.context_tokens, settings.parallel, self.threads)
        arms: list[Arm] = []
        notes: list[str] = []
        traces: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
        quants = {"dense": self.job.recipe.export.quant, "pruned": self.job.recipe.export.quant}
        quants |= {f"dense {quant}": quant for quant in rivals or {}}
        for name, exported in zip(quants, (dense, pruned, *(rivals or {}).values()), strict=True):
            answers = self.answer(exported, name, engine_settings)
            traces = traces or answers.traces
            sparsity = exports.measure_sparsity(exported, self.job.prunable_weights)
            known = exported.size_bytes, quants[name], sparsity
            arms.append(
                Arm(name, answers.records, *known, answers.stats, exported.files, answers.kernels)
            )
            if answers.earlier:
                notes.append(
                    f"{answers.earlier} of {len(answers.records)} {name} answers are of an earlier run on this "
                    "machine, with the same artifact and settings; racdeploy bench measures speed"
                )
        exact = replace(engine_settings, parallel=1, cache_dtype="f32")
        metadata, _ = exports.load(self.job.recipe.export.format).measure(pruned.path)
        logits = compare_logits(
            lambda: open_engine("transformers", model.folder, exact),
            lambda: open_engine("transformers", self.job.model.folder, exact),
            lambda: open_engine(self.job.backend, pruned.path, exact),
            traces[: settings.logit_traces],
        )
        rows = tensor_rows(pruned)
        prunable = {t.name for t in pruned.tensors if t.source in self.job.prunable_weights}
        evidence = Evidence(
            settings=settings,
            gate=self.job.gate,
            dense=arms[0],
            pruned=arms[1],
            backend=self.job.backend,
            rivals=tuple(arms[2:]),
            artifact=pruned.path,
            artifact_files=pruned.files,
            sparsity_asked=self.job.weigh_sparsity_asked(model.linears),
            sparsity_recipe=self.job.recipe.prune.sparsity if model.undone else None,
            tensors=rows,
            prunable=frozenset(prunable),
            dense_linears=frozenset(row.name for row in model.linears if row.sparsity_asked == 0),
            probes=held.probes,
            logits=logits,
            also=tuple(
                sibling._answer_also(exported, engine_settings)
                for sibling, exported in zip(self._siblings, also, strict=True)
            ),
            prompts=probe_prompts(self.job.encoder, metadata, self._chat_ids()),
            stop_ids=stop_ids_of(metadata, self.job.checkpoint.eos_ids),
            packing=self.job.recipe.export.packing,
        )
        report = summarize(
            evidence,
            run_checks(evidence),
            linears=model.linears_beside(self.job.recipe.prune.sparsity),
            blocks=model.blocks,
            model=self.job.recipe.model,
            target=self.job.recipe.target,
            recipe=self.job.recipe.model_dump(mode="json"),
            notes=[
                *_selection_notes(model.selection),
                *model.notes,
                *pruned.notes,
                *held.notes,
                *notes,
                *control_notes(settings, len(rivals or {})),
            ],
            fingerprint=fingerprint(engine_settings),
            created=datetime.now(UTC),
        )
        every = [*arms, *(other.arm for other in evidence.also)]
        return report, [record for arm in every for record in arm.records]

    @property
    def _siblings(self) -> tuple[Verification, ...]:
        """The same for each of the further targets."""
        return tuple(replace(self, job=job) for job in self.job.siblings)

    def _answer_also(self, exported: ExportResult, settings: EngineSettings) -> OtherArtifact:
        """Answer the evaluation prompts with the artifact of a further target."""
        name, quant = f"pruned, {self.job.backend}", self.job.recipe.export.quant
        answers, sparsity = (
            self.answer(exported, name, settings),
            exports.measure_sparsity(exported, self.job.prunable_weights),
        )
        known = exported.size_bytes, quant, sparsity
        arm = Arm(name, answers.records, *known, answers.stats, exported.files, answers.kernels)
        return OtherArtifact(arm, self.job.backend, exported.path, exported.files)

    def _chat_ids(self) -> dict[str, list[int]]:
        """Return prompt ids by question, as transformers makes them."""
        from racdeploy.engines.transformers import chat_ids

        questions = [problem.question for problem in self.job.problems("evaluation")]
        return dict(zip(questions, chat_ids(self.job.model.folder, questions), strict=True))

    def _timed(self) -> bool:
        """Return whether speed or memory of both arms have to come from one run."""
        gate = self.job.gate
        return (
            gate.limits(speed.Limits).ratio is not None
            or gate.limits(memory.Limits).ratio is not None
        )


def _selection_notes(selection: Mapping[str, Any]) -> list[str]:
    left_out = ", ".join(f"{count} {reason}" for reason, count in selection["left_out"].items())
    note = (
        f"calibrated on {selection['calibration_tokens']} tokens of {selection['calibration_traces']} "
        f"{'prompts' if selection['source'] == 'prompt' else 'traces'}"
    )
    notes = [f"{note}; left out: {left_out}" if left_out else note]
    if selection["calibration_tokens"] < 0.98 * selection["rac_tokens"]:
        notes.append(
            f"the tasks ran out of prompts: whole traces would have been {selection['rac_tokens']} tokens"
        )
    return notes
