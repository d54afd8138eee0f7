"""What calibration gathers: a Hessian for each stream of each input.

H = Σ x xᵀ over tokens, float32, one per stream (prompt, thinking, answer) and one for held-out traces. It is additive,
so mixtures of streams and the held-out error need no further forward pass.
Source: SparseGPT (arXiv 2301.00774) section 3; streams follow RAC (arXiv 2509.12464).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from racdeploy.artifacts import STREAMS

__all__ = ["PAD", "InputStatistic"]

PAD = -1


@dataclass
class InputStatistic:
    """Hessians of one input, by stream; index 3 holds the held-out traces.

    Args:
        width: number of inputs I.
    """

    width: int
    hessian_SII: torch.Tensor = field(init=False)
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.hessian_SII = torch.zeros(len(STREAMS) + 1, self.width, self.width)
        self.tokens = [0] * (len(STREAMS) + 1)

    def add(self, input_BTI: torch.Tensor, stream_BT: torch.Tensor, held_out: bool) -> None:
        """Add a batch; positions whose stream is ``PAD`` do not count."""
        for stream in range(len(STREAMS)):
            chosen_NI = input_BTI[stream_BT == stream].float()
            if not len(chosen_NI):
                continue
            slot = len(STREAMS) if held_out else stream
            self.hessian_SII[slot].addmm_(chosen_NI.T, chosen_NI)
            self.tokens[slot] += len(chosen_NI)

    def calibration_II(self) -> torch.Tensor:
        """Return the mean Hessian over all calibration tokens."""
        count = sum(self.tokens[: len(STREAMS)])
        assert count, "calibration saw no tokens"
        return self.hessian_SII[: len(STREAMS)].sum(0) / count

    def relative_errors(self, before_OI: torch.Tensor, after_OI: torch.Tensor) -> dict[str, float]:
        """Return tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) per stream and ``held_out``, of those that saw tokens."""
        delta_OI = before_OI - after_OI
        errors = {}
        for slot, name in enumerate((*STREAMS, "held_out")):
            hessian_II = self.hessian_SII[slot]
            energy = float(((before_OI @ hessian_II) * before_OI).sum(dtype=torch.float64))
            lost = float(((delta_OI @ hessian_II) * delta_OI).sum(dtype=torch.float64))
            if self.tokens[slot] and energy > 0:
                errors[name] = max(lost, 0.0) / energy
        return errors
