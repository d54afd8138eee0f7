"""The state of a recovery between phases, and the rows that record its curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from racdeploy.files.reading import Json
from racdeploy.pipeline.recovery_phases import Phase
from racdeploy.recovery.training_log import PhaseResult
from racdeploy.results.pruning import RecoveryRow
from racdeploy.traces.probe import ProbeResult
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class State:
    """A model between phases, how it answers, and the record of the recovery so far."""

    folder: Path
    probe: ProbeResult
    answers: Sequence[Trace]
    tokens: int = 0  # trained on since the start, in undone phases too
    is_exhausted: bool = False  # a round of own answers brought no gain
    is_coded: bool = False
    rows: tuple[RecoveryRow, ...] = ()
    notes: tuple[str, ...] = ()

    def after(self, phase: Phase, result: PhaseResult, trained: Path) -> State:
        """Return the state after a phase, with the rows of its curve.

        Args:
            trained: folder of its model, which exists if some state was better than the start.
        """
        # Every phase evaluates its start, but the curve needs only the first one's.
        rows = []
        for row in result.log:
            is_start = not row.tokens
            if is_start and self.rows:
                continue
            rows.append(
                RecoveryRow(
                    phase="start" if is_start else phase.name,
                    tokens=self.tokens + row.tokens,
                    loss=row.loss,
                    kl_nats=row.kl_nats,
                    text_kl_nats=row.text_kl_nats,
                    kept=is_start or result.better,
                )
            )

        ended = result.log[-1].note
        notes = (f"recovery, {phase.name}: {ended}",) if ended else ()

        return replace(
            self,
            folder=trained if result.better else self.folder,
            tokens=self.tokens + phase.tokens,
            rows=(*self.rows, *rows),
            notes=(*self.notes, *notes),
        )


def mark(
    rows: Sequence[RecoveryRow], phase: str, probe: ProbeResult, *, kept: bool
) -> tuple[RecoveryRow, ...]:
    """Return the rows with a phase marked as kept or undone, and its accuracy on the last row."""
    marked = []
    changes: Json = {"kept": kept, "accuracy": probe.accuracy}
    for row in reversed(rows):
        if row.phase == phase:
            row = row.model_copy(update=changes)
            changes.pop("accuracy", None)
        marked.append(row)

    return tuple(reversed(marked))
