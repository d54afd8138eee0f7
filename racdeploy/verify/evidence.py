"""Verification: does the exported model still reason, as well and as briefly as the dense one?

One file per check. A check has ``check(evidence) -> CheckResult``: it reads what was measured and decides;
measuring happens in ``_measure.py``, deciding between figures in ``stats.py``. A check with limits has a class
``Limits``, which is its table in the gate (``_gate.py``). ``run_checks`` runs every file of this folder, so a new
check takes part by existing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.recipe import Verification
from racdeploy.report.model import CheckResult, PositionRow, Record, TensorRow
from racdeploy.verify import stats
from racdeploy.verify.gate import Gate, Limits

T = TypeVar("T")


L = TypeVar("L", bound=Limits)


@dataclass(frozen=True)
class Arm:
    """One model's answers.

    Args:
        name: ``dense`` or ``pruned``.
        records: one per prompt and sample, in that order.
        size_bytes: of the artifact.
        quant: its number format.
        sparsity: zeros over the prunable weights in the file, 0 to 1.
        stats: what the engine counted: ``load_ms``, ``generated_tokens``, ``decode_s``, …
        files: SHA-256 of each file of the artifact.
        kernels: what ran it, in the engine's words; empty where nothing is known.
    """

    name: str
    records: tuple[Record, ...]
    size_bytes: int
    quant: str
    sparsity: float
    stats: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""

    def by_prompt(self, value: Callable[[Record], T]) -> list[list[T]]:
        """Return a value of every record, the samples of a prompt in one row."""
        rows: dict[int, list[T]] = {}
        for record in self.records:
            rows.setdefault(record.prompt, []).append(value(record))
        return list(rows.values())


@dataclass(frozen=True)
class OtherArtifact:
    """The pruned model for another engine, in the same bundle; ``artifact`` and ``files`` as in :class:`Evidence`."""

    arm: Arm
    backend: str
    artifact: Path
    artifact_files: Mapping[str, str]


@dataclass(frozen=True)
class TokenProbe:
    """A text with the ids the tokenizer gives and the ids the engine gives."""

    text: str
    expected: tuple[int, ...]
    actual: tuple[int, ...]


@dataclass(frozen=True)
class PromptProbe:
    """A question, rendered and tokenized in several places.

    Args:
        question: what the user asks.
        expected: by transformers, or as recorded when the bundle was built.
        rendered: by the bundle's template and tokenizer.
        artifact: by the template inside the artifact; None where it has none.
        lead: the beginning-of-sequence that the tokenizer demands and templates may leave out.
    """

    question: str
    expected: tuple[int, ...]
    rendered: tuple[int, ...]
    artifact: tuple[int, ...] | None = None
    lead: tuple[int, ...] = ()


@dataclass(frozen=True)
class StopIds:
    """End-of-sequence ids of the checkpoint, and the one that the artifact names; None where it names none."""

    expected: tuple[int, ...]
    actual: int | None


@dataclass(frozen=True)
class LogitComparison:
    """Teacher-forced comparison on the dense model's own traces, over completion tokens.

    Args:
        tokens: positions compared.
        export_kl: mean KL(torch-pruned ‖ artifact), in nats: did the *export* change the model?
        export_top1: share of positions with the same most likely token.
        export_changed: share at which the artifact's is less than half as likely as the checkpoint's own; no tie.
        pruning_kl: mean KL(torch-dense ‖ torch-pruned): did the *pruning*?
        pruning_top1: share of positions with the same most likely token.
        pruning_changed: share at which the pruned one's is less than half as likely to dense as dense's own.
        along: the same divergences by distance from the end of the prompt.
    """

    tokens: int
    export_kl: float
    export_top1: float
    export_changed: float
    pruning_kl: float
    pruning_top1: float
    pruning_changed: float
    along: tuple[PositionRow, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Everything the checks may look at; what was not measured is None, and a check says so.

    ``artifact`` is the main file of the pruned artifact, ``artifact_files`` the recorded hash of each of its files, by
    the path from the main file's folder. ``probes`` is None where the engine ``backend`` has no tokenizer of its own.
    ``sparsity_recipe`` is None unless a step of the recipe's schedule was undone; ``sparsity_asked`` is then the last
    kept step's. ``also`` are the bundle's artifacts for other engines. ``rivals`` are dense models in other quants:
    no check looks at them.
    """

    settings: Verification
    gate: Gate
    dense: Arm
    pruned: Arm
    artifact: Path
    artifact_files: Mapping[str, str]
    sparsity_asked: float
    tensors: tuple[TensorRow, ...] = ()
    prunable: frozenset[str] = frozenset()
    dense_linears: frozenset[str] = frozenset()
    probes: tuple[TokenProbe, ...] | None = ()
    logits: LogitComparison | None = None
    backend: str = ""
    also: tuple[OtherArtifact, ...] = ()
    rivals: tuple[Arm, ...] = ()
    prompts: tuple[PromptProbe, ...] = ()
    stop_ids: StopIds | None = None
    packing: str = "plain"
    sparsity_recipe: float | None = None

    def limits(self, kind: type[L]) -> L:
        """Return the gate's limits of the check that asks, by its class."""
        return self.gate.limits(kind)

    def disagreements(self, holds: Callable[[Record], bool]) -> stats.Pairs:
        """Count the prompts for which something holds of one arm only; ``n10`` is dense only."""
        return stats.paired_counts(self.dense.by_prompt(holds), self.pruned.by_prompt(holds))


def run_checks(evidence: Evidence) -> list[CheckResult]:
    """Run the checks of this folder that the gate asks for, in name order.

    Raises:
        UsageError: the gate file names a check for which nothing was measured.
    """
    results = []
    for name in plugins.names("checks"):
        if evidence.gate.runs(name):
            results.append(plugins.load("checks", name).check(evidence))
        else:
            results.append(
                CheckResult(name=name, verdict="skipped", summary="the gate does not ask for it")
            )
    for result in results:
        nothing = result.verdict == "skipped" or (
            result.verdict == "inconclusive" and not result.figures
        )
        if nothing and result.name in evidence.gate.demanded:
            raise UsageError(
                f"the gate file names the check {result.name}, which has nothing to decide on: {result.summary}",
                remedy=result.remedy or f"take [{result.name}] out of the gate file",
            )
    return results
