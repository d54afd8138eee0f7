"""Log of a training, and the result of a phase, as its stage records it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.files.reading import Json


@dataclass(frozen=True)
class LogRow:
    """One row of the training log, like those of transformers' ``log_history``.

    Args:
        tokens: trained on in this phase so far.
        loss: mean training loss since the row before, in the method's own unit.
        kl_nats: mean KL(dense ‖ sparse) over held-out traces; None if not measured.
        text_kl_nats: the same over held-out parts of the user's own text; None without one.
        note: in the last row, the reason why training ended early, or empty.
    """

    tokens: int
    loss: float | None = None
    kl_nats: float | None = None
    text_kl_nats: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PhaseResult:
    """Result of a training phase.

    Args:
        better: some state after the start is nearer to the dense model; its weights are kept.
    """

    log: tuple[LogRow, ...]
    better: bool

    @classmethod
    def from_summary(cls, summary: Json) -> PhaseResult:
        """Return the result of a finished stage."""
        rows = [LogRow(**row) for row in summary["log"]]
        return cls(tuple(rows), summary["better"])
