"""Adam under a fixed mask, lean in memory: a weight that is zero stays zero, to the last bit.

The mask is the weights themselves: what is zero is not moved. Moments are bfloat16, 4 bytes a
weight in place of 8. That asks for a second moment that forgets fast: at 0.95 a step adds 5 % of
it, at the usual 0.999 it would add less than bfloat16 can tell apart, and the moment would stand
still.

Source: Adam, arXiv 1412.6980; decoupled decay is left out, since it shrinks what pruning chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
_EPSILON = 1e-8
_PIECE = 1 << 20  # weights at a time: passing copies stay in a core's cache


class MaskedAdam:
    """Adam over named weights; their ``grad`` is read, and emptied by :meth:`step`."""

    def __init__(self, weights: Mapping[str, Tensor], masked: Sequence[str]) -> None:
        self.weights = dict(weights)
        self.masked = frozenset(masked)
        self.steps = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

        for name, weight in weights.items():
            empty = torch.zeros_like(weight, dtype=torch.bfloat16, requires_grad=False)
            self.moments[name] = (empty, empty.clone())

    @torch.no_grad()
    def step(self, rate: float, norm: float) -> None:
        """Move every weight that is not masked; gradients longer than 1 are shortened."""
        self.steps += 1
        shorten = min(1.0, 1 / norm) if norm > 0 else 1.0
        bias = tuple(1 - beta**self.steps for beta in BETAS)

        for name, weight in self.weights.items():
            if weight.grad is None:
                continue

            first, second = self.moments[name]
            slope_N = weight.grad.mul_(shorten).view(-1)

            for start in range(0, weight.numel(), _PIECE):
                piece = slice(start, start + _PIECE)
                first_N = first.view(-1)[piece]
                second_N = second.view(-1)[piece]
                move_N = _find_move(slope_N[piece], first_N, second_N, bias)

                weight_N = weight.data.view(-1)[piece]
                if name in self.masked:
                    move_N *= weight_N != 0
                weight_N.sub_(move_N, alpha=rate)

            weight.grad = None


def _find_move(
    slope_N: Tensor, first_N: Tensor, second_N: Tensor, bias: tuple[float, ...]
) -> Tensor:
    """Take a gradient into both moments, and return the move at a learning rate of 1."""
    mean_N = first_N.float().lerp_(slope_N, 1 - BETAS[0])
    square_N = second_N.float().lerp_(slope_N.square(), 1 - BETAS[1])
    first_N.copy_(mean_N)
    second_N.copy_(square_N)

    # Of what was found, not of what was rounded to be kept.
    return mean_N.div_(bias[0]).div_(square_N.div_(bias[1]).sqrt_().add_(_EPSILON))


def gradient_norm(weights: Mapping[str, Tensor]) -> float:
    """Return the length of all gradients together, as one vector."""
    squares = []
    for weight in weights.values():
        if weight.grad is not None:
            squares.append(float(weight.grad.double().square().sum()))
    return math.sqrt(math.fsum(squares))


def rate_at(peak: float, done: float) -> float:
    """Return the learning rate after a share of the training: a twentieth up, then down to zero."""
    warm_up = 0.05
    if done < warm_up:
        return peak * done / warm_up
    return peak * (1 - done) / (1 - warm_up)
