"""Wanda: each output loses the weights with the least |weight| × root of the input's energy.

Source: arXiv 2306.11695, section 3. Nothing is compensated; that is for ``prune.refit_steps``.
"""

from __future__ import annotations

import torch

from racdeploy.prune.methods import Pruned
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.weights.patterns import Pattern
from racdeploy.recipe import Pruning

MATRICES, COPIES = 1, 9  # no factor; two sorts with 64-bit places


def prune(weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning) -> Pruned:
    """Zero the least important weights of every output."""
    keep_OI = pattern.keep_per_output(weight_OI.abs() * hessian.norm_I)
    return Pruned(weight_OI * keep_OI, keep_OI)
