"""Traces for the next step of a pruning schedule: the sparse model's good ones, and dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from racdeploy.recipe import Pruning
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class Probe:
    """How a sparse model answered the calibration prompts, beside the dense model."""

    accuracy: float
    dense_accuracy: float
    length_ratio: float  # thinking tokens of all answers, to the dense model's

    @classmethod
    def of(cls, own: Sequence[Trace], dense: Sequence[Trace]) -> Probe:
        """Compare traces of the same prompts."""
        assert len(own) == len(dense), "both models answered the same prompts"
        own_tokens = sum(trace.thinking_tokens for trace in own)
        dense_tokens = sum(trace.thinking_tokens for trace in dense)
        return cls(
            accuracy=sum(trace.correct for trace in own) / len(own),
            dense_accuracy=sum(trace.correct for trace in dense) / len(dense),
            length_ratio=own_tokens / max(dense_tokens, 1),
        )

    def reason(self, settings: Pruning) -> str:
        """Return why the step goes too far, or an empty string."""
        if self.dense_accuracy - self.accuracy > settings.probe_drop:
            both = f"accuracy {self.accuracy:.1%} against {self.dense_accuracy:.1%}"
            return f"{both}, more than {settings.probe_drop:.0%} below"
        if self.length_ratio > settings.probe_length:
            limit = settings.probe_length
            return f"thinking {self.length_ratio:.2f} times as long, limit {limit:g}"
        return ""


def mix(own: Sequence[Trace], dense: Sequence[Trace], dense_share: float) -> list[Trace]:
    """Return one trace per prompt, in order.

    Dense ones are spread evenly by their share, and replace own ones that are wrong or truncated.
    If the dense one is, too, it is left to the selection that follows.
    """
    mixed = []
    for index, (mine, theirs) in enumerate(zip(own, dense, strict=True)):
        turn = int((index + 1) * dense_share) > int(index * dense_share)
        chosen = theirs if turn or mine.truncated or not mine.correct else mine
        mixed.append(replace(chosen, index=index))
    return mixed
