"""Verify a bundle again: rerun its prompts, compare with its dense answers or others, decide."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from racdeploy import __version__, export
from racdeploy.bundles.bench import locate_dense
from racdeploy.bundles.bundle import Bundle
from racdeploy.engines import open_engine
from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.addresses import release_of
from racdeploy.files.reading import Json
from racdeploy.files.stages import Stage
from racdeploy.manifest import ArtifactEntry
from racdeploy.models.family_lookup import find_family
from racdeploy.results.answers import Record
from racdeploy.results.pruning import TensorRow
from racdeploy.results.report import Report
from racdeploy.runtime.control import NO_CONTROL, describe_control
from racdeploy.sparse_kernels import STOCK, Mode, kernels_used
from racdeploy.verify.answers import Answers, Respondent, identity
from racdeploy.verify.baseline import Baseline, differences, find_dense_arm
from racdeploy.verify.conclude import conclude
from racdeploy.verify.evidence import (
    Arm,
    Evidence,
    OtherArtifact,
    StopIds,
    length_budget,
)
from racdeploy.verify.gate import Gate
from racdeploy.verify.measure import fingerprint, probe_prompts, probe_tokens, read_stop_ids
from racdeploy.verify.plan import expect_as_before, plan
from racdeploy.verify.probe_strings import gate_strings

if TYPE_CHECKING:
    from racdeploy.bundles.harness import HarnessComparison
    from racdeploy.bundles.server_answers import ServerAnswerer

_NO_LOGITS = "logits were compared when the bundle was built: that needs the dense model and torch"
_AS_BUILT = (
    "model", "target", "linears", "blocks", "structure", "kept", "recovery", "deviations",
)  # fmt: skip
"""Fields of the report that stay as they were when the bundle was built."""


@dataclass(frozen=True)
class _Measured:
    """What is in an artifact's files; ``sparsity`` is that of the prunable linears."""

    metadata: Json
    stop_ids: StopIds | None
    tensors: tuple[TensorRow, ...]
    prunable: frozenset[str]
    sparsity: float


@dataclass(frozen=True)
class ArtifactAnswerer:
    """The bundle's own artifacts, run here, resumed in ``work``; 0 ``threads`` use every core."""

    bundle: Bundle
    work: Path
    threads: int = 0
    accel: Mode = "auto"
    progress: Progress | None = None
    _used: set[Path] = field(default_factory=set, init=False, compare=False)

    @cached_property
    def respondent(self) -> Respondent:
        return self.bundle.respondent(self.progress)

    @cached_property
    def engine_settings(self) -> EngineSettings:
        # Kernels that are not used give the same answers as where they are switched off.
        unused = self.accel == "auto" and kernels_used("auto", self.threads) == STOCK
        settings = self.bundle.settings
        mode = "off" if unused else self.accel
        return EngineSettings(settings.context_tokens, settings.parallel, self.threads, accel=mode)

    @cached_property
    def fingerprint(self) -> Json:
        """What the answers depend on."""
        return fingerprint(self.engine_settings)

    def gather(self, dense: Arm, notes: list[str]) -> tuple[Evidence, list[str]]:
        """Return what the checks look at, and notes on both arms."""
        own = self.bundle.own
        main, *others = own.manifest.artifacts
        pruned, measured, earlier = self._run(main, "pruned")
        ran = [f"the pruned artifact ran on {pruned.kernels}"] if pruned.kernels else []

        accepted = own.recipe.export.accept_token_differences
        with self._open(main, self.bundle.folder / main.path) as engine:
            probes = probe_tokens(engine, self.respondent.encoder, gate_strings(accepted))

        also = []
        for entry in others:
            arm, _, again = self._run(entry, f"pruned, {entry.backend}")
            path = self.bundle.folder / entry.path
            also.append(OtherArtifact(arm, entry.backend, path, _list_files(entry)))

            earlier += again
            if arm.kernels:
                ran.append(f"the one for {entry.backend} ran on {arm.kernels}")

        asked = own.manifest.pruning.get("sparsity_asked", own.recipe.prune.sparsity)
        kept_dense = [row.name for row in own.report.linears if row.sparsity_asked == 0]
        asked_ids = {record.question: record.prompt_ids for record in own.pruned}

        evidence = Evidence(
            settings=self.bundle.settings,
            gate=self.bundle.gate,
            dense=dense,
            pruned=pruned,
            backend=main.backend,
            artifact=self.bundle.folder / main.path,
            artifact_files=_list_files(main),
            sparsity_asked=float(asked),
            dense_linears=frozenset(kept_dense),
            tensors=measured.tensors,
            prunable=measured.prunable,
            probes=probes,
            token_differences=accepted,
            prompts=probe_prompts(self.respondent.encoder, measured.metadata, asked_ids),
            stop_ids=measured.stop_ids,
            packing=main.packing,
            also=tuple(also),
        )

        generation = own.manifest.generation
        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        if control and generation.thinking != NO_CONTROL:
            ran.append(f"the pruned model ran as it ships, its thinking under control: {control}")

        return evidence, [*notes, *ran, *note_earlier(earlier), _NO_LOGITS]

    def answer(
        self,
        entry: ArtifactEntry,
        path: Path,
        files: Mapping[str, str],
        arm: str,
        respondent: Respondent,
    ) -> Answers:
        """Answer with a main file as the entry says; ``files`` are the hashes of all its files."""
        inputs = identity(files, respondent, self.engine_settings, self.fingerprint)
        version = {"version": release_of(__version__), "backend": entry.backend}
        stage = Stage.open(self.work, "verify", version | inputs)
        self._used.add(stage.folder)

        log = CompletionLog(stage.folder / "completions.jsonl")
        problems = self.bundle.problems
        return respondent.answer(lambda: self._open(entry, path), problems, arm, log)

    def forget(self) -> None:
        """Remove the answers."""
        for folder in self._used:
            shutil.rmtree(folder)

    def _run(self, entry: ArtifactEntry, name: str) -> tuple[Arm, _Measured, int]:
        """Answer with an artifact, look into its file, and count what was answered before."""
        path = self.bundle.folder / entry.path
        answers = self.answer(entry, path, entry.files, name, self.respondent)
        measured = _measure_artifact(self.bundle.own, entry)

        known = (entry.size_bytes, entry.quant, measured.sparsity)
        files = _list_files(entry)
        arm = Arm(name, answers.records, *known, answers.stats, files, answers.kernels)

        return arm, measured, answers.earlier

    def _open(self, entry: ArtifactEntry, path: Path) -> Engine:
        return open_engine(entry.backend, path, self.engine_settings)


@dataclass(frozen=True)
class Reverification:
    """A bundle on its way to a report.

    Args:
        local: runs artifacts here, the dense one among them.
        answerer: a server that gives the answers that are judged; None takes ``local``.
        baseline: dense artifact, or another bundle of the same dense model; None takes the own one.
        asker: an evaluation harness that asks both models, too.
    """

    local: ArtifactAnswerer
    answerer: ServerAnswerer | None = None
    baseline: Path | None = None
    asker: HarnessComparison | None = None

    @property
    def gate(self) -> Gate:
        return self.local.bundle.gate

    def plan(self) -> Json:
        """Return what this verification can decide, before it runs; what it needs is looked at."""
        bundle = self.local.bundle
        fresh = self._fresh
        if fresh is None:
            dense_answers = f"{len(self._recorded())} recorded"
        else:
            bundle.own.check_artifact(fresh)
            dense_answers = f"new ones of {fresh}"

        settings = bundle.settings
        prompts = len(bundle.problems)
        answers = prompts * settings.samples * (1 if fresh is None else 2)

        dense = Arm("dense", bundle.own.dense)
        pruned = Arm("pruned", bundle.own.pruned)
        expected = expect_as_before(dense, pruned, length_budget(settings))

        return {
            "bundle": str(bundle.folder),
            "tier": bundle.tier or "as built",
            "dense_answers": dense_answers,
            "tokens_at_most": answers * settings.max_new_tokens,
            **plan(settings, bundle.gate, expected, prompts),
            **({"harness": self.asker.plan()} if self.asker else {}),
        }

    def run(self) -> tuple[Report, list[Record]]:
        """Answer, compare and decide."""
        self.plan()  # whatever is wrong is reported before any work
        answerer = self.answerer or self.local

        # First: a task that a harness does not know shows in a minute.
        asked, told = self.asker.run() if self.asker else (None, [])
        dense, notes = self._answer_dense(answerer.fingerprint)
        evidence, notes = answerer.gather(dense, notes)
        evidence = replace(evidence, harness=asked)

        own = self.local.bundle.own
        found = conclude(
            evidence,
            [*notes, *told],
            recipe=own.recipe,
            fingerprint=answerer.fingerprint,
            **{name: getattr(own.report, name) for name in _AS_BUILT},
        )

        self.local.forget()
        if answerer is not self.local:
            answerer.forget()

        return found

    @property
    def _fresh(self) -> Path | None:
        """The dense artifact that answers again, or None."""
        if self.baseline is None or self.baseline.is_dir():
            return None
        return self.baseline

    @cached_property
    def _source(self) -> Baseline:
        """The bundle whose dense answers are taken."""
        own = self.local.bundle.own
        if self.baseline is None:
            return own
        found = Baseline.read(self.baseline)
        found.check_model(own.manifest)
        return found

    def _recorded(self) -> tuple[Record, ...]:
        bundle = self.local.bundle
        if bundle.tier and self.baseline is None:
            self._check_stored()
        return self._source.answers(bundle.problems, bundle.settings)

    def _check_stored(self) -> None:
        """Refuse a tier with more prompts than the bundle has dense answers to."""
        bundle = self.local.bundle
        stored, asked = len(bundle.own.problems), len(bundle.problems)
        if asked <= stored:
            return

        samples = bundle.settings.samples
        missing, wanted = samples * (asked - stored), samples * asked
        found = locate_dense(self.local.work, find_dense_arm(bundle.own.report).files)
        dense = found or "DENSE, the artifact that the build left below its --work folder"

        raise UsageError(
            "missing-dense-answers",
            f"{missing} of {wanted} answers of the dense model are not in {bundle.folder}: "
            f"tier {bundle.tier} asks {asked} prompts, and it stores the answers to {stored}",
            remedy=f"leave --tier out, which asks those {stored}; or a gate file with "
            f"tiers.{bundle.tier}.prompts = {stored}; or --baseline {dense}",
        )

    def _answer_dense(self, fingerprint: Mapping[str, Any]) -> tuple[Arm, list[str]]:
        """Return the dense arm, and where it comes from."""
        own = self.local.bundle.own
        recorded = find_dense_arm(own.report)
        known = (recorded.size_bytes, recorded.quant or "", recorded.sparsity)
        files = recorded.files

        if self._fresh is not None:
            entry = own.manifest.artifacts[0]
            asker = self.local.bundle.dense_respondent(self.local.progress)
            answers = self.local.answer(entry, self._fresh, files, "dense", asker)
            arm = Arm("dense", answers.records, *known, answers.stats, files, answers.kernels)
            return arm, [f"the dense arm was run again, from {self._fresh.name}"]

        source = self._source
        other = "" if source is own else f", from {source.folder.name}"
        created = source.report.created

        notes = [
            f"the dense arm was not rerun: its records are of {created:%Y-%m-%d %H:%M} UTC{other}, "
            "and its speed is not shown beside one measured now"
        ]

        if changed := "; ".join(differences(source.report.fingerprint, fingerprint)):
            notes.append(f"the dense answers were made under other conditions: {changed}")

        return Arm("dense", self._recorded(), *known, {}, files, recorded.kernels or ""), notes


def note_earlier(earlier: int) -> list[str]:
    """Return what a reader must know of answers that an interrupted run left."""
    return [f"{earlier} answers are of an earlier run that was interrupted"] if earlier else []


def _measure_artifact(own: Baseline, entry: ArtifactEntry) -> _Measured:
    """Measure one artifact of a bundle."""
    path = own.folder / entry.path
    family = find_family({"model_type": own.manifest.base.get("model_type")})
    form = export.load(entry.format)
    metadata, found = form.measure(path)
    reasons = {row.name: row.reason for row in own.report.tensors}

    rows: list[TensorRow] = []
    prunable: set[str] = set()
    zeros = weights = 0.0
    for tensor in found:
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
                # A tensor that the report does not list is a table of the graph's own.
                quant_asked=entry.quant if name in reasons else tensor.type,
                quant_real=tensor.type,
                zeros=tensor.zeros,
                size_bytes=tensor.size_bytes,
                bits=8 * tensor.size_bytes / count,
                reason=reasons.get(name, ""),
                packing=tensor.packing,
            )
        )

    sparsity = zeros / weights if weights else 0.0
    stop_ids = read_stop_ids(form.TOKENIZER_PREFIX, metadata, own.manifest.tokenizer.eos_ids)
    return _Measured(metadata, stop_ids, tuple(rows), frozenset(prunable), sparsity)


def _list_files(entry: ArtifactEntry) -> dict[str, str]:
    """Return the hash of each file by its path from the folder of the main one."""
    folder = PurePosixPath(entry.path).parent
    return {
        PurePosixPath(name).relative_to(folder).as_posix(): sha256
        for name, sha256 in entry.files.items()
    }
