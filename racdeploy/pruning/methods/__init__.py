"""Pruning methods: one file per method.

A method file has ``prune(weight_OI, hessian, pattern, settings) -> PrunedWeights``. ``weight_OI``
is float32, may be overwritten, and is zero where an input was never active. ``hessian`` is the
damped :class:`~racdeploy.pruning.walk.hessian.Hessian` that linears with the same input share. A
method that needs more or less memory than the default has ``MATRICES`` and ``COPIES``, see
:mod:`racdeploy.pruning.memory_estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PrunedWeights:
    """Weights of a pruned linear: float32, zero where ``keep_OI`` is False."""

    weight_OI: Tensor
    keep_OI: Tensor
