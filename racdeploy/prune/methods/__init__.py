"""Pruning methods: one file per method.

A method file has ``prune(weight_OI, hessian, pattern, settings) -> Pruned``. ``weight_OI`` is
float32, may be overwritten, and is zero where an input was never active; ``hessian`` is the damped
:class:`~racdeploy.prune.walk.hessian.Hessian` that linears with the same input share. A method that
takes other memory than most has ``MATRICES`` and ``COPIES``, see :mod:`racdeploy.prune.cost`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned:
    """A pruned linear: float32, with zeros where ``keep_OI`` is False."""

    weight_OI: torch.Tensor
    keep_OI: torch.Tensor
