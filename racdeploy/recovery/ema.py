"""Exponential moving average (EMA) of the trained parameters, at four bytes per parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from racdeploy.recovery.parameters import WeightParameters


class WeightEma:
    """EMA of the values that the optimizer updates; off at a ``decay`` of 0."""

    def __init__(self, variables: WeightParameters, decay: float) -> None:
        self._variables = variables
        self._decay = decay
        self.values: dict[str, torch.Tensor] = {}

        if decay:
            for name, value in variables.parameters.items():
                self.values[name] = value.detach().clone()

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Update the average after a step.

        The decay grows with the steps: otherwise the start would weigh on a short training.
        """
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for name, mean in self.values.items():
            mean.lerp_(self._variables.parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Restart the average at the current values, after an earlier state was loaded."""
        for name, mean in self.values.items():
            mean.copy_(self._variables.parameters[name])

    @contextmanager
    def apply_average(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Give the model the averaged values inside the ``with`` body, if the EMA is on."""
        self._swap()
        try:
            yield self._variables.weights
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self.values:
            return

        for name, mean in self.values.items():
            moved = self._variables.parameters[name]
            current = moved.detach().clone()  # swapped in place: sharded models alias this memory
            moved.copy_(mean)
            mean.copy_(current)

        self._variables.update_weights()
