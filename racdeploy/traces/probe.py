"""How a pruned model answers the calibration prompts, beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class Probe:
    """Accuracy and thinking length on the calibration prompts."""

    accuracy: float
    length_ratio: float  # thinking tokens of all answers, to the dense model's

    @classmethod
    def of(cls, own: Sequence[Trace], dense: Sequence[Trace]) -> Probe:
        """Compare traces of the same prompts."""
        assert len(own) == len(dense), "both models answered the same prompts"
        own_tokens = sum(trace.thinking_tokens for trace in own)
        dense_tokens = sum(trace.thinking_tokens for trace in dense)
        return cls(
            accuracy=sum(trace.correct for trace in own) / len(own),
            length_ratio=own_tokens / max(dense_tokens, 1),
        )
