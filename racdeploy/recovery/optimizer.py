"""Adam under a fixed mask, with bfloat16 moments: zero weights stay exactly zero.

The mask is the weights themselves: zeros are not updated. Moments take 4 bytes per weight in place
of 8. Therefore beta2 is 0.95: a step then changes the second moment by 5 %, while at the usual
0.999 the change would be below bfloat16's resolution and the moment would never move.

Source: Adam, arXiv 1412.6980; without weight decay, which would shrink the weights pruning chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
_EPSILON = 1e-8
_CHUNK_WEIGHTS = 1 << 20  # at a time: temporary copies stay in a core's cache


class MaskedAdam:
    """Adam over named weights; :meth:`step` uses and clears their ``grad``."""

    def __init__(self, weights: Mapping[str, Tensor], masked: Sequence[str]) -> None:
        self.weights = dict(weights)
        self.masked = frozenset(masked)
        self.steps = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

        for name, weight in weights.items():
            empty = torch.zeros_like(weight, dtype=torch.bfloat16, requires_grad=False)
            self.moments[name] = (empty, empty.clone())

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Update every weight; of the masked ones, those that are not zero.

        Args:
            gradient_norm: of all gradients together; they are scaled to a norm of 1 at most.
        """
        self.steps += 1
        clip = min(1.0, 1 / gradient_norm) if gradient_norm > 0 else 1.0
        corrections = tuple(1 - beta**self.steps for beta in BETAS)

        for name, weight in self.weights.items():
            if weight.grad is None:
                continue

            first, second = self.moments[name]
            gradient_N = weight.grad.mul_(clip).view(-1)

            for start in range(0, weight.numel(), _CHUNK_WEIGHTS):
                chunk = slice(start, start + _CHUNK_WEIGHTS)
                first_N = first.view(-1)[chunk]
                second_N = second.view(-1)[chunk]
                mean_N = first_N.float().lerp_(gradient_N[chunk], 1 - BETAS[0])
                square_N = second_N.float().lerp_(gradient_N[chunk].square(), 1 - BETAS[1])
                first_N.copy_(mean_N)
                second_N.copy_(square_N)

                # From the float32 moments, not from their rounded copies.
                root_N = square_N.div_(corrections[1]).sqrt_().add_(_EPSILON)
                update_N = mean_N.div_(corrections[0]).div_(root_N)

                weight_N = weight.data.view(-1)[chunk]
                if name in self.masked:
                    update_N *= weight_N != 0
                weight_N.sub_(update_N, alpha=learning_rate)

            weight.grad = None


def gradient_norm(weights: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all gradients together."""
    gradients = (weight.grad for weight in weights.values() if weight.grad is not None)
    return math.sqrt(math.fsum(float(each.double().square().sum()) for each in gradients))


def learning_rate_at(peak: float, done: float) -> float:
    """Return the learning rate after the share ``done`` of the training.

    It rises linearly over the first twentieth, then falls linearly to zero.
    """
    warm_up = 0.05
    if done < warm_up:
        return peak * done / warm_up
    return peak * (1 - done) / (1 - warm_up)
