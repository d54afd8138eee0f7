"""Probe of a pruned model: its answers to the calibration prompts against the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy and thinking length of a model on the calibration prompts."""

    accuracy: float
    length_ratio: float  # thinking tokens of all answers, to the dense model's

    @classmethod
    def measure(cls, traces: Sequence[Trace], dense: Sequence[Trace]) -> ProbeResult:
        """Compare a model's traces with the dense model's, of the same prompts."""
        assert len(traces) == len(dense), "both models answered the same prompts"
        thinking_tokens = sum(trace.thinking_tokens for trace in traces)
        dense_tokens = sum(trace.thinking_tokens for trace in dense)
        return cls(
            accuracy=sum(trace.correct for trace in traces) / len(traces),
            length_ratio=thinking_tokens / max(dense_tokens, 1),
        )
