"""Verification of a finished bundle: rerun its prompts, compare with dense answers, decide.

The bundle is asked as any model is, see :class:`~racdeploy.verification.examiner.Examiner`. It adds
its stored dense answers, its other artifacts, and what was measured in its files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy.bundles.bundle import BundleToVerify
from racdeploy.bundles.harness import HarnessRunner
from racdeploy.models.family_lookup import find_family
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.plan import BundlePlan, Plan
from racdeploy.results.report import Report
from racdeploy.runtime.control import NO_CONTROL, describe_control
from racdeploy.runtime.deployed import DeployedModel, find_served
from racdeploy.verification.baseline import Baseline, compare_fingerprints
from racdeploy.verification.evidence import (
    ArmResult,
    Evidence,
    Findings,
    length_budget,
)
from racdeploy.verification.examiner import Examiner, note_resumed_answers
from racdeploy.verification.gate import Gate
from racdeploy.verification.measurements import encode_probes
from racdeploy.verification.plan import estimate_from_arms
from racdeploy.verification.reference import Reference
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.shipped_model import ShippedArtifact, ShippedModel
from racdeploy.verification.subject import Subject

_NO_LOGITS = "logits were compared when the bundle was built: that needs the dense model and torch"
_AS_BUILT = (
    "model", "target", "linears", "blocks", "structure", "kept_structure", "recovery", "deviations",
)  # fmt: skip
"""Fields of the report that are copied from the build."""


@dataclass(frozen=True)
class BundleVerification:
    """Verification of a bundle.

    Args:
        server: a server whose answers are judged, as ``URL#MODEL``; empty runs the artifacts.
        baseline: dense artifact, or another bundle of the same dense model; None takes the bundle's
            own records.
        harness: an evaluation harness that also asks both models.
    """

    bundle: BundleToVerify
    server: str = ""
    baseline: Path | None = None
    harness: HarnessRunner | None = None

    @property
    def gate(self) -> Gate:
        return self.bundle.gate

    def plan(self) -> Plan:
        """Return costs and power of this verification; raise an error for anything missing."""
        bundle, fresh = self.bundle, self._fresh
        models = [self._model]
        if fresh is None:
            dense_answers = f"{len(self._recorded())} recorded"
        else:
            bundle.contents.check_artifact(fresh)
            dense_answers = f"new answers of {fresh}"
            models.append(bundle.open_dense(fresh))

        dense = ArmResult("dense", bundle.contents.dense)
        pruned = ArmResult("pruned", bundle.contents.pruned)
        expected = estimate_from_arms(dense, pruned, length_budget(bundle.settings))

        plan = self._examiner.plan(models, expected)
        verified = BundlePlan(
            bundle=str(bundle.folder),
            tier=bundle.tier or "as built",
            dense_answers=dense_answers,
            harness=self.harness.plan(fresh) if self.harness else "",
        )
        return replace(plan, bundle=verified)

    def run(self) -> tuple[Report, list[AnswerRecord]]:
        """Answer, compare and decide; return the report and all records."""
        self.plan()  # report problems before any work
        with self.bundle.examiner.until_judged():
            return self._judge()

    def _judge(self) -> tuple[Report, list[AnswerRecord]]:
        bundle, model = self.bundle, self._model
        if not model.url and self.gate.is_enabled("integrity"):
            bundle.check_integrity()

        # The harness goes first: an unknown task fails within a minute.
        harness_runs, harness_notes = self.harness.run(self._fresh) if self.harness else (None, [])
        subject = self._subject
        examiner = self._examiner.stop_when_clear(self._weigh_interim)
        reference, origin = self._open_reference(examiner)
        ran: list[str] = []
        if model.url:
            accepted = bundle.contents.recipe.export.accept_token_differences
            findings = Findings(token_differences=accepted)
        else:
            findings, ran = self._inspect(examiner)
        findings = replace(findings, harness=harness_runs)
        evidence, notes = examiner.examine(subject, reference, findings)

        kernels = evidence.pruned.kernels
        if kernels and not model.url:
            ran.insert(0, f"the pruned artifact ran on {kernels}")
        contents = bundle.contents
        result = build_report(
            evidence,
            [*notes, *origin, *ran, *harness_notes],
            recipe=contents.recipe.model_dump(mode="json"),
            fingerprint=bundle.examiner.fingerprint(model.url),
            **{name: getattr(contents.report, name) for name in _AS_BUILT},
        )

        bundle.refuse_changes()
        return result

    @cached_property
    def _model(self) -> DeployedModel:
        """The bundle's first artifact, or what a server answers in its place."""
        model = self.bundle.model
        return find_served(self.server, model) if self.server else model

    @cached_property
    def _subject(self) -> Subject:
        """What is asked and judged."""
        model = self._model
        return Subject.from_deployed(model) if model.url else self._shipped.main.measured()

    @cached_property
    def _examiner(self) -> Examiner:
        """Asks the problems of which the dense answers are known, or can be made."""
        examiner = self.bundle.examiner
        planned = examiner.planned or len(examiner.problems)
        if self._fresh or self._source.planned != planned:
            return examiner

        # The build of another bundle may have been clear earlier.
        known = len(self._source.problems)
        if known >= len(examiner.problems):
            return examiner
        return replace(examiner, problems=examiner.problems[:known], planned=planned)

    def _weigh_interim(self, examiner: Examiner) -> Evidence:
        """Ask both models the prompts of an interim analysis."""
        dense = self._answer_dense(examiner)
        if not self._model.url:
            return self._shipped.weigh_interim(examiner, dense)

        pruned, _ = examiner.answer(self._subject, "pruned")
        return examiner.weigh(self._subject, dense, pruned, Findings())

    @property
    def _fresh(self) -> Path | None:
        """Dense artifact to run again, or None to use recorded answers."""
        if self.baseline is None or self.baseline.is_dir():
            return None
        return self.baseline

    @cached_property
    def _source(self) -> Baseline:
        """Bundle whose recorded dense answers are used."""
        contents = self.bundle.contents
        if self.baseline is None:
            return contents
        baseline = Baseline.read(self.baseline)
        baseline.check_model(contents.manifest)
        return baseline

    def _recorded(self) -> tuple[AnswerRecord, ...]:
        bundle, source = self.bundle, self._source
        dense = bundle.find_dense() or "DENSE, which the build left below its --work folder"
        remedy = f"--baseline {dense}"
        if tier := bundle.tier:
            stored = len(source.problems)
            remedy = (
                f"omit --tier to ask the {stored} prompts that are stored; or use a gate file with "
                f"tiers.{tier}.prompts = {stored}; or {remedy}"
            )
        return source.answers(self._examiner.problems, bundle.settings, remedy)

    def _answer_dense(self, examiner: Examiner) -> ArmResult:
        """Return the dense answers to an examiner's prompts, rerun or recorded."""
        bundle = self.bundle
        recorded = bundle.contents.report.dense_arm
        if self._fresh is not None:
            dense = Subject.from_deployed(bundle.open_dense(self._fresh))
            arm, _ = examiner.answer(replace(dense, sparsity=recorded.sparsity), "dense")
            return arm

        # No engine statistics: times of another run or machine cannot be compared.
        arm = ArmResult(
            "dense",
            records=self._recorded(),
            size_bytes=recorded.size_bytes,
            quant=recorded.quant or "",
            sparsity=recorded.sparsity,
            files=recorded.files,
            kernels=recorded.kernels or "",
        )
        return arm.take(len(examiner.problems))

    def _open_reference(self, examiner: Examiner) -> tuple[Reference, list[str]]:
        """Return the dense model with its answers to an examiner's prompts, and their origin."""
        bundle, contents = self.bundle, self.bundle.contents
        if self._fresh is not None:
            notes = [f"the dense arm was run again, from {self._fresh.name}"]
        else:
            notes = self._describe_recorded()

        encoder, tokenizer = bundle.model.encoder, contents.manifest.tokenizer
        probes = encode_probes(encoder, contents.recipe.export.accept_token_differences)
        return Reference(
            name="dense",
            tasks=contents.recipe.tasks,
            settings=bundle.settings,
            stop_ids=tokenizer.eos_ids,
            vocabulary=encoder.tokenizer.get_vocab_size(),
            probes=probes,
            arm=self._answer_dense(examiner),
        ), notes

    def _describe_recorded(self) -> list[str]:
        """Return notes on recorded dense answers."""
        source = self._source
        source_note = "" if source is self.bundle.contents else f", from {source.folder.name}"
        created = source.report.created

        notes = [
            "the dense arm was not rerun: its records are of "
            f"{created:%Y-%m-%d %H:%M} UTC{source_note}, so its speed is not compared with the "
            "current one"
        ]

        now = self.bundle.examiner.fingerprint(self._model.url)
        if changed := "; ".join(compare_fingerprints(source.report.fingerprint, now)):
            notes.append(f"the dense answers were made under other conditions: {changed}")
        return notes

    @cached_property
    def _shipped(self) -> ShippedModel:
        """The bundle's model, as its manifest and report describe it."""
        bundle, stored = self.bundle, self.bundle.contents
        manifest, recipe = stored.manifest, stored.recipe
        family = find_family({"model_type": manifest.base.model_type})
        exported = {row.name: row for row in stored.report.tensors}

        artifacts = []
        for entry in manifest.artifacts:
            settings, path = manifest.run_time(entry), bundle.folder / entry.path
            subject = Subject.from_deployed(replace(bundle.model, settings=settings, path=path))
            # The report has the tensors of the first artifact.
            rows = exported if entry is manifest.artifacts[0] else {}
            artifact = ShippedArtifact(
                subject=subject,
                family=family,
                format=entry.format,
                packing=entry.packing,
                exported=rows,
            )
            artifacts.append(artifact)

        requested = manifest.pruning.requested_sparsity
        if requested is None:
            requested = recipe.prune.sparsity
        return ShippedModel(
            artifacts=artifacts,
            prompt_ids={record.question: record.prompt_ids for record in stored.pruned},
            eos_ids=manifest.tokenizer.eos_ids,
            requested_sparsity=requested,
            linears=stored.report.linears,
            token_differences=recipe.export.accept_token_differences,
        )

    def _inspect(self, examiner: Examiner) -> tuple[Findings, list[str]]:
        """Return what the files and the other artifacts show, and notes on how they ran."""
        shipped = self._shipped
        generation = self.bundle.contents.manifest.generation
        others, notes = [], []
        for other, reused in shipped.answer_others(examiner):
            whose = f"the one for {other.backend}"
            others.append(other)
            notes += note_resumed_answers(reused, f" of {whose}")
            if other.arm.kernels:
                notes.append(f"{whose} ran on {other.arm.kernels}")

        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        if control and generation.thinking != NO_CONTROL:
            notes.append(f"the pruned model ran with its thinking control: {control}")
        findings = replace(shipped.inspect(), other_artifacts=tuple(others))
        return findings, [*notes, _NO_LOGITS]
