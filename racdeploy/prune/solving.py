"""Choose the zeros of linears on one statistic: by the recipe's method, in the recipe's pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from racdeploy import plugins
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize
from racdeploy.models.reordering import order_columns
from racdeploy.prune.held_out import RelativeError
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import Pattern
from racdeploy.prune.pruned_linear import PrunedLinear
from racdeploy.prune.refit import prune_and_refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.prune.statistics import InputStatistic
from racdeploy.quant import as_grid
from racdeploy.recipe import Pruning

Solved = tuple[torch.Tensor, torch.Tensor, float]
"""Pruned weights, their target, and the damping."""


class Solver:
    """What a recipe says of how linears are pruned."""

    def __init__(self, checkpoint: Checkpoint, settings: Pruning, tasks: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        self._settings, self._tasks = settings, tasks
        self._method = plugins.load("methods", settings.method)

    def solve(
        self,
        own: Sequence[int],
        linears: Sequence[str],
        full: Sequence[torch.Tensor],
        patterns: Sequence[Pattern],
        statistic: InputStatistic,
        quants: Sequence[str],
    ) -> dict[int, Solved]:
        """Return the linears at the places ``own`` of those that the statistic is of.

        ``quants`` are the number formats whose codes are chosen, or empty strings.
        """
        hessian = statistic.hessian(self._settings.damping)
        targets = dict(enumerate(full))
        if self._settings.match_dense:
            targets = statistic.targets(own, hessian)

        solved = {}
        for place in own:
            given = targets[place], hessian, patterns[place]
            weight_OI = self._prune(linears[place], quants[place], *given)
            solved[place] = weight_OI, targets[place], hessian.damping

        return solved

    def describe(
        self,
        full_OI: torch.Tensor,
        stored: torch.dtype,
        statistic: InputStatistic,
        solved: Solved | None,
        quant: str,
    ) -> PrunedLinear:
        """Return a linear as its owner solved it; elsewhere one of its shape."""
        if quant:  # codes times a scale need more digits than bfloat16 has
            stored = torch.float32

        weight_OI, target_OI, damping = solved or (full_OI, full_OI, 0.0)
        return PrunedLinear(
            weight_OI.to(stored).contiguous(),
            target_OI,
            damping,
            RelativeError(self._tasks),
            statistic.importance_I,
            round(statistic.weight),
        )

    def _prune(
        self, linear: str, name: str, target_OI: torch.Tensor, hessian: Hessian, pattern: Pattern
    ) -> torch.Tensor:
        live_OI = target_OI * ~hessian.dead_I
        pruned = prune_and_refit(self._method, live_OI, hessian, pattern, self._settings)
        if not name:
            return pruned.weight_OI

        quant = as_grid(name)
        order_I = None
        if "gguf" in quant.FORMATS:
            order_I = find_order(self._checkpoint, linear, target_OI)
        return round_to_grid(pruned, live_OI, hessian, quant, order_I)


def find_order(checkpoint: Checkpoint, linear: str, weight_OI: torch.Tensor) -> torch.Tensor | None:
    """Return which column of a linear comes at each place of a GGUF file, if others do."""
    transform = checkpoint.family.transforms.get(f"{generalize(linear)}.weight")
    order_I = order_columns(transform, checkpoint, weight_OI.shape[1])
    return None if order_I is None else torch.from_numpy(order_I).to(weight_OI.device)
