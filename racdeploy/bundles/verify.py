"""Verify a finished bundle again: rerun its prompts, compare with dense answers, decide.

The dense answers are those that the bundle carries, those of another bundle of the same dense model, or new ones of
the dense artifact; they are never mixed. The report says which, and what differs between the machines.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from racdeploy import __version__, export
from racdeploy.accel import STOCK, Mode, kernels
from racdeploy.decoding.completion_log import CompletionLog
from racdeploy.decoding.engine import Engine, EngineSettings
from racdeploy.engines import open_engine
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.manifest import ArtifactEntry
from racdeploy.models.families import family_of
from racdeploy.recipe import Verification
from racdeploy.report.model import Record, Report, TensorRow
from racdeploy.runtime.model import check_unpacked
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import tags_of
from racdeploy.storage.stages import Stage
from racdeploy.tasks import Problem, TaskSet
from racdeploy.verify.answers import Answers, Respondent, identity
from racdeploy.verify.baseline import Baseline, differences
from racdeploy.verify.evidence import Arm, Evidence, OtherArtifact, run_checks
from racdeploy.verify.gate import Gate, read_gate
from racdeploy.verify.measure import fingerprint, probe_prompts, probe_tokens, stop_ids_of
from racdeploy.verify.plan import expectation_of, plan
from racdeploy.verify.probe_strings import probe_strings
from racdeploy.verify.summary import summarize

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reverification:
    """A bundle on its way to a report.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        work: where the answers of an interrupted run wait.
        gate_file: limits that go over the bundle's own, or None.
        tier: of the gate; empty asks what the build asked.
        baseline: dense artifact, or another bundle of the same dense model; None takes the bundle's own records.
        threads: CPU threads; 0 uses every core.
        progress: called with a label, prompts done and prompts in all.
        accel: kernels for sparse weights, see :func:`racdeploy.accel.enable`.
    """

    bundle: Path
    work: Path
    gate_file: Path | None = None
    tier: str = ""
    baseline: Path | None = None
    threads: int = 0
    progress: Progress | None = None
    accel: Mode = "auto"

    @cached_property
    def own(self) -> Baseline:
        """The bundle with its records, its files checked.

        Raises:
            ArtifactError: the bundle is damaged.
        """
        found = Baseline.read(self.bundle)
        found.manifest.check_tokenizer(self.bundle)
        check_unpacked(self.bundle, found.manifest.artifacts[0])
        return found

    @cached_property
    def gate(self) -> Gate:
        """The limits of the file over those of the bundle, for the tier.

        Raises:
            UsageError: unknown keys, bad values, or an unknown tier.
        """
        read_gate(self.gate_file).at(self.tier)
        return read_gate(self.gate_file, self.own.recipe.gate).at(self.tier)

    @cached_property
    def settings(self) -> Verification:
        """How prompts are answered; logits need the checkpoints and torch."""
        built = self.own.recipe.verify
        chosen = getattr(self.gate.tiers, self.tier).apply(built) if self.tier else built
        return chosen.model_copy(update={"logit_traces": 0})

    @cached_property
    def problems(self) -> list[Problem]:
        """What is asked: a part of what the build asked, or its tasks' further problems behind those.

        Raises:
            UsageError: the tasks are not on this machine, or no longer the same.
        """
        recorded = self.own.problems
        if not self.tier or self.settings.count <= len(recorded):
            return recorded[: self.settings.count] if self.tier else recorded
        recipe = self.own.recipe
        drawn = TaskSet.load(recipe.tasks, recipe.calibration_tasks).draw(
            "evaluation", self.settings.seed, self.settings.count
        )
        if [(p.question, p.gold) for p in drawn[: len(recorded)]] != [
            (p.question, p.gold) for p in recorded
        ]:
            raise UsageError(
                "the tasks no longer give the problems that the bundle was built with",
                remedy="use the same files, or a tier of at most "
                f"{len(recorded)} prompts, which are in the bundle: --gate with tiers.{self.tier}.prompts",
            )
        return drawn

    def plan(self) -> dict[str, Any]:
        """Return what this verification can decide, before it runs; everything it needs is looked at."""
        if self._fresh is not None:
            if not self._fresh.is_file():
                raise UsageError(
                    f"{self._fresh} does not exist",
                    remedy="give the dense artifact, or a bundle of the same dense model",
                )
            self.own.check_artifact(self._fresh)
        dense = self._recorded() if self._fresh is None else ()
        own, settings = self.own, self.settings
        before, after = Arm("dense", own.dense, 0, "", 0.0), Arm("pruned", own.pruned, 0, "", 0.0)
        expected = expectation_of(
            before, after, settings.max_thinking_tokens or settings.max_new_tokens
        )
        return {
            "bundle": str(self.bundle),
            "tier": self.tier or "as built",
            "dense_answers": f"new ones of {self._fresh}"
            if self._fresh
            else f"{len(dense)} recorded",
            "tokens_at_most": (1 + bool(self._fresh))
            * len(self.problems)
            * settings.samples
            * settings.max_new_tokens,
            **plan(settings, self.gate, expected, len(self.problems)),
        }

    def run(self) -> tuple[Report, list[Record]]:
        """Answer, compare and decide.

        Raises:
            UsageError: the gate or the baseline does not fit.
            ArtifactError: the bundle is damaged.
            EngineError: the engine cannot run the artifact.
        """
        self.plan()  # whatever is wrong is said before any work
        entry, *others = self.own.manifest.artifacts
        dense, notes = self._dense()
        pruned, metadata, rows, prunable, earlier = self._arm(entry, "pruned")
        notes += [f"the pruned artifact ran on {pruned.kernels}"] if pruned.kernels else []
        with self._opened(entry, self.bundle / entry.path) as engine:
            probes = probe_tokens(engine, self._respondent.encoder, probe_strings())
        also = []
        for other in others:
            arm, _, _, _, again = self._arm(other, f"pruned, {other.backend}")
            notes += [f"the one for {other.backend} ran on {arm.kernels}"] if arm.kernels else []
            also.append(
                OtherArtifact(arm, other.backend, self.bundle / other.path, _recorded_files(other))
            )
            earlier += again
        linears, asked = self.own.report.linears, self.own.recipe.prune.sparsity
        evidence = Evidence(
            settings=self.settings,
            gate=self.gate,
            dense=dense,
            pruned=pruned,
            backend=entry.backend,
            artifact=self.bundle / entry.path,
            artifact_files=_recorded_files(entry),
            sparsity_asked=float(self.own.manifest.pruning.get("sparsity_asked", asked)),
            sparsity_recipe=asked
            if float(self.own.manifest.pruning.get("sparsity", asked)) < asked
            else None,
            dense_linears=frozenset(row.name for row in linears if row.sparsity_asked == 0),
            tensors=rows,
            prunable=prunable,
            probes=probes,
            prompts=probe_prompts(
                self._respondent.encoder,
                metadata,
                {r.question: r.prompt_ids for r in self.own.dense},
            ),
            stop_ids=stop_ids_of(metadata, self.own.manifest.tokenizer.eos_ids),
            packing=entry.packing,
            also=tuple(also),
        )
        report = summarize(
            evidence,
            run_checks(evidence),
            linears=linears,
            blocks=self.own.report.blocks,
            model=self.own.report.model,
            target=self.own.report.target,
            recipe=self.own.recipe.model_dump(mode="json"),
            notes=[
                *notes,
                *(
                    [f"{earlier} answers are of an earlier run that was interrupted"]
                    if earlier
                    else []
                ),
                "logits were compared when the bundle was built: that needs the dense model and torch",
            ],
            fingerprint=self._fingerprint,
            created=datetime.now(UTC),
        )
        self._forget()
        arms = [dense, pruned, *(other.arm for other in also)]
        return report, [record for arm in arms for record in arm.records]

    @property
    def _fresh(self) -> Path | None:
        """The dense artifact that answers anew, or None."""
        return self.baseline if self.baseline is not None and not self.baseline.is_dir() else None

    @cached_property
    def _respondent(self) -> Respondent:
        tokenizer = self.own.manifest.tokenizer
        encoder = PromptEncoder.from_folder(self.bundle)
        names = tokenizer.open_tag, tokenizer.close_tag
        tags = tags_of(encoder, names[0], names[1]) if names[0] and names[1] else None
        return Respondent(encoder, tags, tokenizer.eos_ids, self.settings, self.progress)

    @cached_property
    def _engine_settings(self) -> EngineSettings:
        unused = (
            self.accel == "auto" and kernels("auto") == STOCK
        )  # the same answers as where they are switched off
        accel: Mode = "off" if unused else self.accel
        return EngineSettings(
            self.settings.context_tokens, self.settings.parallel, self.threads, accel=accel
        )

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self._engine_settings)

    def _source(self) -> Baseline:
        """Return the bundle whose dense answers are taken."""
        if self.baseline is None:
            return self.own
        found = Baseline.read(self.baseline)
        found.check_model(self.own.manifest)
        return found

    def _recorded(self) -> tuple[Record, ...]:
        return self._source().answers(self.problems, self.settings)

    def _dense(self) -> tuple[Arm, list[str]]:
        """Return the dense arm, and where it comes from."""
        recorded = self.own.arm("dense")
        known = (recorded.size_bytes or 0, recorded.quant or "", recorded.sparsity or 0.0)
        if self._fresh is not None:
            answers = self._answer(
                self.own.manifest.artifacts[0], self._fresh, recorded.files, "dense"
            )
            return Arm(
                "dense", answers.records, *known, answers.stats, recorded.files, answers.kernels
            ), [f"the dense arm was run anew, from {self._fresh.name}"]
        source = self._source()
        changed = differences(source.report.fingerprint, self._fingerprint)
        note = (
            f"the dense arm was not rerun: its records are of {source.report.created:%Y-%m-%d %H:%M} UTC"
            f"{'' if source is self.own else f', from {source.folder.name}'}, and its speed is not shown beside one "
            "measured now"
        )
        labels = (
            [f"the dense answers were made under other conditions: {'; '.join(changed)}"]
            if changed
            else []
        )
        return Arm("dense", self._recorded(), *known, {}, recorded.files, recorded.kernels or ""), [
            note,
            *labels,
        ]

    def _arm(
        self, entry: ArtifactEntry, name: str
    ) -> tuple[Arm, dict[str, Any], tuple[TensorRow, ...], frozenset[str], int]:
        """Answer with one artifact of the bundle; what is in its file, and how many answers were there."""
        answers = self._answer(entry, self.bundle / entry.path, entry.files, name)
        metadata, rows, prunable, sparsity = self._measured(entry)
        known = entry.size_bytes, entry.quant, sparsity
        arm = Arm(
            name, answers.records, *known, answers.stats, _recorded_files(entry), answers.kernels
        )
        return arm, metadata, rows, prunable, answers.earlier

    def _answer(
        self, entry: ArtifactEntry, path: Path, files: Mapping[str, str], arm: str
    ) -> Answers:
        """Answer with one file; an interrupted run left its answers in the work folder."""
        log = CompletionLog(self._stage(entry, files).folder / "completions.jsonl")
        return self._respondent.answer(lambda: self._opened(entry, path), self.problems, arm, log)

    def _stage(self, entry: ArtifactEntry, files: Mapping[str, str]) -> Stage:
        inputs = identity(files, self.settings, self._engine_settings, self._fingerprint)
        return Stage.open(
            self.work, "verify", {"version": __version__, "backend": entry.backend, **inputs}
        )

    def _forget(self) -> None:
        """Remove the answers of a finished run: the next one verifies anew."""
        main, *_ = self.own.manifest.artifacts
        used = [(entry, entry.files) for entry in self.own.manifest.artifacts]
        if self._fresh is not None:
            used.append((main, self.own.arm("dense").files))
        for entry, files in used:
            shutil.rmtree(self._stage(entry, files).folder)

    def _opened(self, entry: ArtifactEntry, path: Path) -> AbstractContextManager[Any]:
        engine: Engine = open_engine(entry.backend, path, self._engine_settings)
        return contextlib.closing(engine)

    def _measured(
        self, entry: ArtifactEntry
    ) -> tuple[dict[str, Any], tuple[TensorRow, ...], frozenset[str], float]:
        """Return metadata and tensors of the file itself, its linears, and the share of zeros in them."""
        family = family_of({"model_type": self.own.manifest.base.get("model_type")})
        form = export.load(entry.format)
        metadata, found = form.measure(self.bundle / entry.path)
        reasons = {row.name: row.reason for row in self.own.report.tensors}
        rows: list[TensorRow] = []
        zeros = weights = 0.0
        prunable: set[str] = set()
        for tensor in found:
            size: Any = tensor["shape"]
            count = float(size[0] * (size[1] if len(size) > 1 else 1))
            if tensor["zeros"] is None:
                raise ArtifactError(
                    f"{self.bundle / entry.path}: racdeploy cannot read type {tensor['type']} of {tensor['name']}",
                    remedy="build the bundle again with a quant of: racdeploy plugins",
                )
            if form.is_linear(family, tensor["name"]):
                prunable.add(tensor["name"])
                zeros, weights = zeros + tensor["zeros"] * count, weights + count
            asked = (
                entry.quant if tensor["name"] in reasons else tensor["type"]
            )  # a table of the graph's own
            rows.append(
                TensorRow(
                    name=tensor["name"],
                    quant_asked=asked,
                    quant_real=tensor["type"],
                    zeros=tensor["zeros"],
                    size_bytes=tensor["size_bytes"],
                    bits=8 * tensor["size_bytes"] / math.prod(tensor["shape"]),
                    reason=reasons.get(tensor["name"], ""),
                    packing=tensor["packing"],
                )
            )
        return metadata, tuple(rows), frozenset(prunable), zeros / weights if weights else 0.0


def _recorded_files(entry: ArtifactEntry) -> dict[str, str]:
    """Return the hash of each file by its path from the folder of the main one."""
    folder = PurePosixPath(entry.path).parent
    return {
        PurePosixPath(name).relative_to(folder).as_posix(): sha256
        for name, sha256 in entry.files.items()
    }
