"""Verification of a finished bundle: rerun its prompts, compare with dense answers, decide."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from racdeploy import __version__, exporting
from racdeploy.bundles.bench import find_dense_in_work
from racdeploy.bundles.bundle import BundleToVerify
from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.errors import ArtifactError, GateError, UsageError
from racdeploy.files.code_hashes import base_version
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.manifest import ArtifactEntry
from racdeploy.models.family_lookup import find_family
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.pruning import TensorRow
from racdeploy.results.report import Report
from racdeploy.runtime.control import NO_CONTROL, describe_control
from racdeploy.sparse_kernels import STOCK, AccelMode, kernels_used
from racdeploy.verification.answer_sampler import AnswerSampler, SampledAnswers, identify_answers
from racdeploy.verification.baseline import Baseline, compare_fingerprints, find_dense_arm
from racdeploy.verification.evidence import (
    ArmResult,
    Evidence,
    OtherArtifact,
    StopIds,
    length_budget,
)
from racdeploy.verification.gate import Gate
from racdeploy.verification.measurements import (
    fingerprint,
    probe_prompts,
    probe_tokens,
    read_stop_ids,
)
from racdeploy.verification.plan import estimate_from_arms, plan
from racdeploy.verification.probe_strings import choose_probe_strings
from racdeploy.verification.report_builder import build_report

if TYPE_CHECKING:
    from racdeploy.bundles.harness import HarnessRunner
    from racdeploy.bundles.server_answers import ServerAnswerSource

_NO_LOGITS = "logits were compared when the bundle was built: that needs the dense model and torch"
_AS_BUILT = (
    "model", "target", "linears", "blocks", "structure", "kept_structure", "recovery", "deviations",
)  # fmt: skip
"""Fields of the report that are copied from the build."""


@dataclass(frozen=True)
class _Measured:
    """Measured content of an artifact; ``sparsity`` is over the prunable linears."""

    metadata: Json
    stop_ids: StopIds | None
    tensors: tuple[TensorRow, ...]
    prunable: frozenset[str]
    sparsity: float


@dataclass(frozen=True)
class LocalAnswerSource:
    """Answers of the bundle's artifacts, run on this machine and resumed in ``work``.

    0 ``threads`` uses every core.
    """

    bundle: BundleToVerify
    work: Path
    threads: int
    accel: AccelMode = "auto"
    progress: Progress | None = None
    _used: set[Path] = field(default_factory=set, init=False, compare=False)

    @cached_property
    def answer_sampler(self) -> AnswerSampler:
        return self.bundle.make_sampler(self.progress)

    @cached_property
    def engine_settings(self) -> EngineSettings:
        # Kernels that will not be used identify the answers like kernels that are off.
        unused = self.accel == "auto" and kernels_used("auto", self.threads) == STOCK
        settings = self.bundle.settings
        mode = "off" if unused else self.accel
        return EngineSettings(settings.context_tokens, settings.parallel, self.threads, accel=mode)

    @cached_property
    def fingerprint(self) -> Json:
        """Machine and engine settings that the answers depend on."""
        return fingerprint(self.engine_settings)

    def check_integrity(self) -> None:
        """Raise GateError for a changed artifact: its answers would be those of another model."""
        contents = self.bundle.contents
        for entry in contents.manifest.artifacts:
            try:
                entry.check_changed_files(contents.folder)
            except ArtifactError as error:
                message = f"integrity failed, so no question was asked: {error.message}"
                raise GateError(error.code, message, remedy=error.remedy) from error

    def gather(self, dense: ArmResult, notes: list[str]) -> tuple[Evidence, list[str]]:
        """Run all artifacts; return the evidence for the checks, and notes on both arms."""
        stored = self.bundle.contents
        main, *others = stored.manifest.artifacts
        pruned, measured, earlier = self._run(main, "pruned")
        ran = [f"the pruned artifact ran on {pruned.kernels}"] if pruned.kernels else []

        accepted = stored.recipe.export.accept_token_differences
        encoder = self.answer_sampler.encoder
        with self._open(main, self.bundle.folder / main.path) as engine:
            probes = probe_tokens(engine, encoder, choose_probe_strings(accepted))

        also = []
        for entry in others:
            arm, _, again = self._run(entry, f"pruned, {entry.backend}")
            file = self.bundle.folder / entry.path
            also.append(OtherArtifact(arm, entry.backend, file, _list_files(entry)))

            earlier += again
            ran += [f"the one for {entry.backend} ran on {arm.kernels}"] if arm.kernels else []

        sparsity = stored.manifest.pruning.get("requested_sparsity", stored.recipe.prune.sparsity)
        # The sparsity check must not expect zeros in linears that were to stay dense.
        dense_rows = (row for row in stored.report.linears if row.requested_sparsity == 0)
        prompt_ids = {record.question: record.prompt_ids for record in stored.pruned}

        evidence = Evidence(
            settings=self.bundle.settings,
            gate=self.bundle.gate,
            dense=dense,
            pruned=pruned,
            backend=main.backend,
            artifact=self.bundle.folder / main.path,
            artifact_files=_list_files(main),
            requested_sparsity=float(sparsity),
            dense_linears=frozenset(row.name for row in dense_rows),
            tensors=measured.tensors,
            prunable=measured.prunable,
            probes=probes,
            token_differences=accepted,
            prompts=probe_prompts(encoder, measured.metadata, prompt_ids),
            stop_ids=measured.stop_ids,
            packing=main.packing,
            other_artifacts=tuple(also),
        )

        generation = stored.manifest.generation
        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        if control and generation.thinking != NO_CONTROL:
            ran.append(f"the pruned model ran with its thinking control: {control}")

        return evidence, [*notes, *ran, *note_resumed_answers(earlier), _NO_LOGITS]

    def answer(
        self,
        entry: ArtifactEntry,
        path: Path,
        files: Mapping[str, str],
        arm: str,
        sampler: AnswerSampler,
    ) -> SampledAnswers:
        """Answer all problems with a file on the entry's engine; ``files`` are its hashes."""
        inputs = identify_answers(files, sampler, self.engine_settings, self.fingerprint)
        version = {"version": base_version(__version__), "backend": entry.backend}
        stage = Stage.open(self.work, "verify", version | inputs)
        self._used.add(stage.folder)

        log = CompletionLog(stage.folder / "completions.jsonl")
        problems = self.bundle.problems
        return sampler.answer(lambda: self._open(entry, path), problems, arm, log)

    def forget(self) -> None:
        """Remove the stored answers, which a finished verification no longer needs."""
        for folder in self._used:
            shutil.rmtree(folder)

    def _run(self, entry: ArtifactEntry, name: str) -> tuple[ArmResult, _Measured, int]:
        """Answer with an artifact and measure it; return also the number of reused answers."""
        path = self.bundle.folder / entry.path
        answers = self.answer(entry, path, entry.files, name, self.answer_sampler)
        measured = _measure_artifact(self.bundle.contents, entry)

        known = (entry.size_bytes, entry.quant, measured.sparsity)
        files = _list_files(entry)
        arm = ArmResult(name, answers.records, *known, answers.stats, files, answers.kernels)

        return arm, measured, answers.reused

    def _open(self, entry: ArtifactEntry, path: Path) -> Engine:
        return open_engine(entry.backend, path, self.engine_settings)


@dataclass(frozen=True)
class BundleVerification:
    """Verification of a bundle.

    Args:
        local: runs artifacts on this machine, including a dense one.
        answer_source: a server whose answers are judged; None takes those of ``local``.
        baseline: dense artifact, or another bundle of the same dense model; None takes the bundle's
            own records.
        harness: an evaluation harness that also asks both models.
    """

    local: LocalAnswerSource
    answer_source: ServerAnswerSource | None = None
    baseline: Path | None = None
    harness: HarnessRunner | None = None

    @property
    def gate(self) -> Gate:
        return self.local.bundle.gate

    def plan(self) -> Json:
        """Return costs and power of this verification; raise an error for anything missing."""
        bundle = self.local.bundle
        fresh = self._fresh
        if fresh is None:
            dense_answers = f"{len(self._recorded())} recorded"
        else:
            bundle.contents.check_artifact(fresh)
            dense_answers = f"new answers of {fresh}"

        settings = bundle.settings
        prompts = len(bundle.problems)
        # Recorded dense answers cost nothing; a dense artifact answers every prompt again.
        answers = prompts * settings.samples * (1 if fresh is None else 2)

        dense = ArmResult("dense", bundle.contents.dense)
        pruned = ArmResult("pruned", bundle.contents.pruned)
        expected = estimate_from_arms(dense, pruned, length_budget(settings))

        return {
            "bundle": str(bundle.folder),
            "tier": bundle.tier or "as built",
            "dense_answers": dense_answers,
            "tokens_at_most": answers * settings.max_new_tokens,
            **plan(settings, bundle.gate, expected, prompts),
            **({"harness": self.harness.plan()} if self.harness else {}),
        }

    def run(self) -> tuple[Report, list[AnswerRecord]]:
        """Answer, compare and decide; return the report and all records."""
        self.plan()  # report problems before any work
        answer_source = self.answer_source or self.local
        if answer_source is self.local and self.gate.is_enabled("integrity"):
            self.local.check_integrity()

        # The harness goes first: an unknown task fails within a minute.
        harness_runs, harness_notes = self.harness.run() if self.harness else (None, [])
        dense, notes = self._answer_dense(answer_source.fingerprint)
        evidence, notes = answer_source.gather(dense, notes)
        evidence = replace(evidence, harness=harness_runs)

        contents = self.local.bundle.contents
        result = build_report(
            evidence,
            [*notes, *harness_notes],
            recipe=contents.recipe,
            fingerprint=answer_source.fingerprint,
            **{name: getattr(contents.report, name) for name in _AS_BUILT},
        )

        self.local.bundle.refuse_changes()
        self.local.forget()
        if answer_source is not self.local:
            answer_source.forget()

        return result

    @property
    def _fresh(self) -> Path | None:
        """Dense artifact to run again, or None to use recorded answers."""
        if self.baseline is None or self.baseline.is_dir():
            return None
        return self.baseline

    @cached_property
    def _source(self) -> Baseline:
        """Bundle whose recorded dense answers are used."""
        contents = self.local.bundle.contents
        if self.baseline is None:
            return contents
        baseline = Baseline.read(self.baseline)
        baseline.check_model(contents.manifest)
        return baseline

    def _recorded(self) -> tuple[AnswerRecord, ...]:
        bundle = self.local.bundle
        if bundle.tier and self.baseline is None:
            self._check_stored()
        return self._source.answers(bundle.problems, bundle.settings)

    def _check_stored(self) -> None:
        """Raise UsageError if a tier has more prompts than the bundle has dense answers."""
        bundle = self.local.bundle
        stored, wanted_prompts = len(bundle.contents.problems), len(bundle.problems)
        if wanted_prompts <= stored:
            return

        samples = bundle.settings.samples
        missing, wanted = samples * (wanted_prompts - stored), samples * wanted_prompts
        path = find_dense_in_work(self.local.work, find_dense_arm(bundle.contents.report).files)
        dense = path or "DENSE, the artifact that the build left below its --work folder"

        raise UsageError(
            "missing-dense-answers",
            f"{missing} of {wanted} answers of the dense model are not in {bundle.folder}: "
            f"tier {bundle.tier} asks {wanted_prompts} prompts, and {stored} are stored",
            remedy=f"omit --tier to ask those {stored}; or use a gate file with "
            f"tiers.{bundle.tier}.prompts = {stored}; or --baseline {dense}",
        )

    def _answer_dense(self, fingerprint: Mapping[str, Any]) -> tuple[ArmResult, list[str]]:
        """Return the dense arm, rerun or recorded, and notes on its origin."""
        contents = self.local.bundle.contents
        recorded = find_dense_arm(contents.report)
        known = (recorded.size_bytes, recorded.quant or "", recorded.sparsity)
        files = recorded.files

        if self._fresh is not None:
            entry = contents.manifest.artifacts[0]
            dense_sampler = self.local.bundle.make_dense_sampler(self.local.progress)
            answers = self.local.answer(entry, self._fresh, files, "dense", dense_sampler)
            arm = ArmResult("dense", answers.records, *known, answers.stats, files, answers.kernels)
            return arm, [f"the dense arm was run again, from {self._fresh.name}"]

        source = self._source
        source_note = "" if source is contents else f", from {source.folder.name}"
        created = source.report.created

        notes = [
            "the dense arm was not rerun: its records are of "
            f"{created:%Y-%m-%d %H:%M} UTC{source_note}, so its speed is not compared with the "
            "current one"
        ]

        if changed := "; ".join(compare_fingerprints(source.report.fingerprint, fingerprint)):
            notes.append(f"the dense answers were made under other conditions: {changed}")

        # No engine statistics: times of another run or machine cannot be compared.
        return ArmResult(
            "dense", self._recorded(), *known, {}, files, recorded.kernels or ""
        ), notes


def note_resumed_answers(earlier: int) -> list[str]:
    """Return a note on answers that were reused from an interrupted run; empty without any."""
    return [f"{earlier} answers are of an earlier run that was interrupted"] if earlier else []


def _measure_artifact(contents: Baseline, entry: ArtifactEntry) -> _Measured:
    """Measure tensors, zeros and stop ids of one artifact.

    Raises:
        ArtifactError: a tensor has a type that cannot be read.
    """
    path = contents.folder / entry.path
    family = find_family({"model_type": contents.manifest.base.get("model_type")})
    form = exporting.load(entry.format)
    metadata, tensors = form.measure(path)
    reasons = {row.name: row.reason for row in contents.report.tensors}

    rows: list[TensorRow] = []
    prunable: set[str] = set()
    zeros = weights = 0.0
    for tensor in tensors:
        name = tensor.name
        if tensor.zeros is None:
            raise ArtifactError(
                "unreadable-tensor-type",
                f"{path}: racdeploy cannot read type {tensor.type} of {name}",
                remedy="build the bundle again with a quant of: racdeploy plugins",
            )

        count = math.prod(tensor.shape)
        if form.is_linear(family, name):
            prunable.add(name)
            zeros += tensor.zeros * count
            weights += count

        rows.append(
            TensorRow(
                name=name,
                # A tensor missing in the report is a constant that the exporter added.
                requested_quant=entry.quant if name in reasons else tensor.type,
                actual_quant=tensor.type,
                zeros=tensor.zeros,
                size_bytes=tensor.size_bytes,
                bits=8 * tensor.size_bytes / count,
                reason=reasons.get(name, ""),
                packing=tensor.packing,
            )
        )

    sparsity = zeros / weights if weights else 0.0
    stop_ids = read_stop_ids(form.TOKENIZER_PREFIX, metadata, contents.manifest.tokenizer.eos_ids)
    return _Measured(metadata, stop_ids, tuple(rows), frozenset(prunable), sparsity)


def _list_files(entry: ArtifactEntry) -> dict[str, str]:
    """Return the hash of each file by its path relative to the main file's folder."""
    folder = PurePosixPath(entry.path).parent
    return {
        PurePosixPath(name).relative_to(folder).as_posix(): sha256
        for name, sha256 in entry.files.items()
    }
