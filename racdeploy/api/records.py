"""Results of the library's functions: small frozen records that print their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from racdeploy.errors import exit_code_of

if TYPE_CHECKING:
    from racdeploy.results.answers import AnswerRecord
    from racdeploy.results.pruning import RecoveryRow
    from racdeploy.results.report import Report
    from racdeploy.results.tuning import Tuning
    from racdeploy.verification.gate import Gate


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Decision of a verification: does the pruned model still reason?

    Args:
        name: the model that was verified; of a comparison, the candidate.
        verdict: ``pass``, ``fail`` or ``inconclusive``, by the checks of the gate.
        exit_code: the command line's for this verdict: 0, 1 or 3.
        accuracy: share of the prompts that the pruned model answers correctly.
        reference_accuracy: the same share for the model that it is compared with, the dense one.
        size_bytes: size of the pruned artifact; None if a server answered.
        reference_size_bytes: size of that model's artifact.
        notes: remarks that are not in the report.
        report: all checks and figures, as in ``report.json``.
        records: every answer, as in ``records.jsonl``.
    """

    name: str
    verdict: Literal["pass", "fail", "inconclusive"]
    exit_code: int
    accuracy: float
    reference_accuracy: float
    size_bytes: int | None
    reference_size_bytes: int | None
    notes: tuple[str, ...] = ()
    report: Report = field(repr=False)
    records: Sequence[AnswerRecord] = field(default=(), repr=False)

    @classmethod
    def from_report(cls, report: Report, gate: Gate, **fields: Any) -> Self:
        """Return the verdict of a report; ``fields`` are those of the subclass."""
        pruned, dense = report.find_arm("pruned"), report.find_arm("dense")
        assert pruned
        assert dense

        return cls(
            name=report.model,
            verdict=report.verdict,
            exit_code=exit_code_of(report.verdict, gate.inconclusive),
            accuracy=pruned.accuracy,
            reference_accuracy=dense.accuracy,
            size_bytes=pruned.size_bytes,
            reference_size_bytes=dense.size_bytes,
            report=report,
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class Bundle(Verdict):
    """A bundle that was built and verified: ``racdeploy.load(bundle.folder)`` runs it."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class TunedBundle(Bundle):
    """Bundle of the best model of a search; ``tuning`` has all candidates, as in ``tune.json``."""

    tuning: Tuning = field(repr=False)


@dataclass(frozen=True)
class PrunedFolder:
    """Folder of a pruned model in safetensors, which transformers loads.

    Args:
        sparsity: fraction of zeros in the prunable linears, 0 to 1.
        notes: remarks on how the model was pruned.
        recovery: evaluations during recovery, in order; empty without recovery.
    """

    folder: Path
    sparsity: float
    notes: tuple[str, ...] = ()
    recovery: tuple[RecoveryRow, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ExportedFile:
    """An exported model.

    Args:
        path: main file, which engines open.
        size_bytes: size of all files.
        files: SHA-256 of each file by its name.
        notes: remarks on the model, and on tensors that are not stored as requested.
    """

    path: Path
    size_bytes: int
    files: Mapping[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()
