"""Verify a finished bundle again: rerun its prompts, compare with dense answers, decide.

The dense answers are those that the bundle carries, those of another bundle of the same dense
model, or new ones of the dense artifact; they are never mixed. The report says which, and what
differs between the machines. The answers that are judged come from the bundle's artifact or from a
server.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from racdeploy import __version__
from racdeploy.accel import STOCK, Mode, kernels
from racdeploy.bundles.bundle import Bundle
from racdeploy.bundles.measure import MeasuredArtifact, measure_artifact, recorded_files
from racdeploy.decoding.completion_log import CompletionLog
from racdeploy.decoding.engine import Engine, EngineSettings
from racdeploy.engines import open_engine
from racdeploy.errors import UsageError
from racdeploy.manifest import ArtifactEntry
from racdeploy.report.model import Record, Report
from racdeploy.storage.stages import Stage
from racdeploy.verify.answers import Answers, Progress, Respondent, identity
from racdeploy.verify.baseline import Baseline, differences
from racdeploy.verify.conclude import conclude
from racdeploy.verify.evidence import Arm, Evidence, OtherArtifact, length_budget
from racdeploy.verify.gate import Gate
from racdeploy.verify.measure import fingerprint, probe_prompts, probe_tokens
from racdeploy.verify.plan import expect_as_before, plan
from racdeploy.verify.probe_strings import probe_strings


class Answerer(Protocol):
    """Who gives the answers that are judged.

    ``fingerprint`` holds what the answers depend on. ``gather`` answers, and returns what the
    checks look at beside the dense arm, and the notes on that arm with its own. ``forget`` removes
    the answers of a finished run, so that the next one verifies from scratch.
    """

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def gather(self, dense: Arm, notes: list[str]) -> tuple[Evidence, list[str]]: ...

    def forget(self) -> None: ...


@dataclass(frozen=True)
class ArtifactAnswerer:
    """The bundle's own artifacts, run here; what an interrupted run answered waits in ``work``.

    Args:
        threads: CPU threads; 0 uses every core.
        accel: kernels for sparse weights, see :func:`racdeploy.accel.enable`.
        progress: called with a label, prompts done and prompts in all.
    """

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
        unused = self.accel == "auto" and kernels("auto") == STOCK
        settings = self.bundle.settings
        mode = "off" if unused else self.accel
        return EngineSettings(settings.context_tokens, settings.parallel, self.threads, accel=mode)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.engine_settings)

    def gather(self, dense: Arm, notes: list[str]) -> tuple[Evidence, list[str]]:
        own = self.bundle.own
        main, *others = own.manifest.artifacts
        pruned, measured, earlier = self._run(main, "pruned")
        ran = [f"the pruned artifact ran on {pruned.kernels}"] if pruned.kernels else []
        encoder = self.respondent.encoder

        with self._open(main, self.bundle.folder / main.path) as engine:
            probes = probe_tokens(engine, encoder, probe_strings())

        also = []
        for entry in others:
            arm, _, again = self._run(entry, f"pruned, {entry.backend}")
            files = recorded_files(entry)
            also.append(OtherArtifact(arm, entry.backend, self.bundle.folder / entry.path, files))
            earlier += again
            if arm.kernels:
                ran.append(f"the one for {entry.backend} ran on {arm.kernels}")

        asked = own.recipe.prune.sparsity
        reached = float(own.manifest.pruning.get("sparsity", asked))
        linears = own.report.linears
        evidence = Evidence(
            settings=self.bundle.settings,
            gate=self.bundle.gate,
            dense=dense,
            pruned=pruned,
            backend=main.backend,
            artifact=self.bundle.folder / main.path,
            artifact_files=recorded_files(main),
            sparsity_asked=float(own.manifest.pruning.get("sparsity_asked", asked)),
            sparsity_recipe=asked if reached < asked else None,
            dense_linears=frozenset(row.name for row in linears if row.sparsity_asked == 0),
            tensors=measured.tensors,
            prunable=measured.prunable,
            probes=probes,
            prompts=probe_prompts(
                encoder, measured.metadata, {r.question: r.prompt_ids for r in own.dense}
            ),
            stop_ids=measured.stop_ids,
            packing=main.packing,
            also=tuple(also),
        )
        logits = "logits were compared when the bundle was built: "
        logits += "that needs the dense model and torch"

        return evidence, [*notes, *ran, *note_earlier(earlier), logits]

    def answer(
        self, entry: ArtifactEntry, path: Path, files: Mapping[str, str], arm: str
    ) -> Answers:
        """Answer with a main file as the entry says; ``files`` are the hashes of all its files."""
        inputs = identity(files, self.bundle.settings, self.engine_settings, self.fingerprint)
        version = {"version": __version__, "backend": entry.backend}
        stage = Stage.open(self.work, "verify", version | inputs)
        self._used.add(stage.folder)
        log = CompletionLog(stage.folder / "completions.jsonl")

        return self.respondent.answer(
            lambda: self._open(entry, path), self.bundle.problems, arm, log
        )

    def forget(self) -> None:
        for folder in self._used:
            shutil.rmtree(folder)

    def _run(self, entry: ArtifactEntry, name: str) -> tuple[Arm, MeasuredArtifact, int]:
        """Answer with an artifact, look into its file, and count what was answered before."""
        path = self.bundle.folder / entry.path
        answers = self.answer(entry, path, entry.files, name)
        measured = measure_artifact(self.bundle.own, entry)

        known = (entry.size_bytes, entry.quant, measured.sparsity)
        files = recorded_files(entry)
        arm = Arm(name, answers.records, *known, answers.stats, files, answers.kernels)

        return arm, measured, answers.earlier

    def _open(self, entry: ArtifactEntry, path: Path) -> Engine:
        return open_engine(entry.backend, path, self.engine_settings)


@dataclass(frozen=True)
class Reverification:
    """A bundle on its way to a report.

    Args:
        local: runs artifacts here, the dense one among them.
        answerer: gives the answers that are judged; None takes ``local``.
        baseline: dense artifact, or another bundle of the same dense model; None takes the
            bundle's own records.
    """

    local: ArtifactAnswerer
    answerer: Answerer | None = None
    baseline: Path | None = None

    @property
    def gate(self) -> Gate:
        return self.local.bundle.gate

    def plan(self) -> dict[str, Any]:
        """Return what this verification can decide, before it runs; what it needs is looked at."""
        bundle = self.local.bundle
        fresh = self._fresh
        if fresh is None:
            dense_answers = f"{len(self._recorded())} recorded"
        else:
            if not fresh.is_file():
                raise UsageError(
                    f"{fresh} does not exist",
                    remedy="give the dense artifact, or a bundle of the same dense model",
                )
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
        }

    def run(self) -> tuple[Report, list[Record]]:
        """Answer, compare and decide.

        Raises:
            UsageError: the gate, the baseline or the server's address does not fit.
            ArtifactError: the bundle is damaged.
            EngineError: the engine cannot run the artifact, or the server failed.
        """
        self.plan()  # whatever is wrong is reported before any work
        answerer = self.answerer or self.local
        dense, notes = self._answer_dense(answerer)
        evidence, notes = answerer.gather(dense, notes)

        context = self.local.bundle.context(answerer.fingerprint)
        report, records = conclude(evidence, context, notes)
        self.local.forget()
        if answerer is not self.local:
            answerer.forget()

        return report, records

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
        return self._source.answers(bundle.problems, bundle.settings)

    def _answer_dense(self, answerer: Answerer) -> tuple[Arm, list[str]]:
        """Return the dense arm, and where it comes from."""
        own = self.local.bundle.own
        recorded = own.dense_arm
        known = (recorded.size_bytes, recorded.quant or "", recorded.sparsity)
        files = recorded.files

        if self._fresh is not None:
            entry = own.manifest.artifacts[0]
            answers = self.local.answer(entry, self._fresh, files, "dense")
            arm = Arm("dense", answers.records, *known, answers.stats, files, answers.kernels)
            return arm, [f"the dense arm was run again, from {self._fresh.name}"]

        source = self._source
        other = "" if source is own else f", from {source.folder.name}"
        created = source.report.created
        notes = [
            f"the dense arm was not rerun: its records are of {created:%Y-%m-%d %H:%M} UTC{other}, "
            "and its speed is not shown beside one measured now"
        ]
        if changed := differences(source.report.fingerprint, answerer.fingerprint):
            conditions = "; ".join(changed)
            notes.append(f"the dense answers were made under other conditions: {conditions}")

        return Arm("dense", self._recorded(), *known, {}, files, recorded.kernels or ""), notes


def note_earlier(earlier: int) -> list[str]:
    """Return what a reader must know of answers that an interrupted run left."""
    return [f"{earlier} answers are of an earlier run that was interrupted"] if earlier else []
