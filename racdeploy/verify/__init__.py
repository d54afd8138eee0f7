"""Verification: does the exported model still reason, as well and as briefly as the dense one?

One file per check. A check has ``check(evidence) -> CheckResult``: it reads what was measured and decides;
measuring happens in ``_measure.py``, deciding between figures in ``stats.py``. ``run_checks`` runs every file of
this folder, so a new check takes part by existing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy import plugins
from racdeploy.recipe import Verification
from racdeploy.report_model import CheckResult, PositionRow, Record, TensorRow

__all__ = ["Arm", "Evidence", "LogitComparison", "TokenProbe", "run_checks"]


@dataclass(frozen=True)
class Arm:
    """One model's answers.

    Args:
        name: ``dense`` or ``pruned``.
        records: one per prompt, in prompt order.
        size_bytes: of the artifact.
        quant: its number format.
        sparsity: zeros over the prunable weights in the file, 0 to 1.
        stats: what the engine counted: ``load_ms``, ``generated_tokens``, ``decode_s``, …
    """

    name: str
    records: tuple[Record, ...]
    size_bytes: int
    quant: str
    sparsity: float
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenProbe:
    """A text with the ids the tokenizer gives and the ids the engine gives."""

    text: str
    expected: tuple[int, ...]
    actual: tuple[int, ...]


@dataclass(frozen=True)
class LogitComparison:
    """Teacher-forced comparison on the dense model's own traces, over completion tokens.

    Args:
        tokens: positions compared.
        export_kl: mean KL(torch-pruned ‖ artifact), in nats: did the *export* change the model?
        export_top1: share of positions with the same most likely token.
        pruning_kl: mean KL(torch-dense ‖ torch-pruned): did the *pruning*?
        pruning_top1: share of positions with the same most likely token.
        along: the same divergences by distance from the end of the prompt.
    """

    tokens: int
    export_kl: float
    export_top1: float
    pruning_kl: float
    pruning_top1: float
    along: tuple[PositionRow, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Everything the checks may look at; what was not measured is None, and a check says so.

    ``artifact`` is the main file of the pruned artifact, ``artifact_files`` the recorded hash of each of its files, by
    the path from the main file's folder.
    """

    settings: Verification
    dense: Arm
    pruned: Arm
    artifact: Path
    artifact_files: Mapping[str, str]
    sparsity_asked: float
    tensors: tuple[TensorRow, ...] = ()
    prunable: frozenset[str] = frozenset()
    dense_linears: frozenset[str] = frozenset()
    probes: tuple[TokenProbe, ...] = ()
    logits: LogitComparison | None = None


def run_checks(evidence: Evidence) -> list[CheckResult]:
    """Run every check of this folder, in name order."""
    return [plugins.load("checks", name).check(evidence) for name in plugins.names("checks")]
