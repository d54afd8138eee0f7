"""Pruning methods: one file per method.

A method file has ``prune(weight_OI, hessian_II, pattern, settings) -> Pruned``. ``weight_OI`` is float32 and may be
overwritten; ``hessian_II`` is the mean Σ x xᵀ over calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned:
    """A pruned linear.

    Args:
        weight_OI: float32, zeros where ``keep_OI`` is False.
        keep_OI: True where the weight stays.
        damping: share of the mean diagonal that was added to the Hessian; 0 where none was needed.
    """

    weight_OI: torch.Tensor
    keep_OI: torch.Tensor
    damping: float
