"""An exponential average of what is moved: steadier than the last step, at four bytes a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from racdeploy.recover.variables import Weights


class Average:
    """Follows the moved values; off at a ``decay`` of 0."""

    def __init__(self, variables: Weights, decay: float) -> None:
        self._variables = variables
        self._decay = decay
        self.values: dict[str, torch.Tensor] = {}

        if decay:
            for name, value in variables.moved.items():
                self.values[name] = value.detach().clone()

    @torch.no_grad()
    def follow(self, steps: int) -> None:
        """Take in the values after a step; the first ones count more, so that the start fades."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for name, mean in self.values.items():
            mean.lerp_(self._variables.moved[name].detach(), 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget what was followed: the moved values have gone elsewhere."""
        for name, mean in self.values.items():
            mean.copy_(self._variables.moved[name])

    @contextmanager
    def shown(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """While the body runs, the model has the average; without one it stays as it is."""
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
            moved = self._variables.moved[name]
            held = moved.detach().clone()  # in place: several processes hold the memory together
            moved.copy_(mean)
            mean.copy_(held)

        self._variables.settle()
