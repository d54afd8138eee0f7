"""How far two models are apart in what they say next, over the whole vocabulary, and its slope.

Both are given by their last hidden states: a few hundred numbers a token in place of the logits.
The slope with respect to the hidden states is written out, so that no logits are kept for a
backward pass: a chunk of tokens at a time is enough.

Source: forward KL(dense ‖ sparse) as in Hinton et al. 2015 (arXiv 1503.02531), reverse
KL(sparse ‖ dense) on own answers as in Gu et al. 2023 (arXiv 2306.08543).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from racdeploy.models.checkpoint import Checkpoint

Direction = Literal["forward", "reverse"]
_ROWS = 4096  # of the projection that are read together
_CHUNK_LOGITS = 1 << 22  # 16 MB in float32, of which there are four at a time


@dataclass(frozen=True)
class Head:
    """The output projection, which neither pruning nor recovery changes.

    ``weight_VD`` is float32, ``short_VD`` the same in bfloat16 where products may be short.
    """

    weight_VD: Tensor
    divisor: float = 1.0  # of the logits
    cap: float = 0.0  # logits are squeezed into ± cap; 0 leaves them
    short_VD: Tensor | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, *, short: bool = False) -> Head:
        """Read the projection of a model; with ``short``, slopes are of bfloat16 products."""
        family = checkpoint.family
        name = family.embedding if checkpoint.tied else "lm_head.weight"
        weight_VD = _read_rows(checkpoint, name).to(device)

        divisor = checkpoint.shape.setting(family.logit_divisor) if family.logit_divisor else 1.0
        cap = checkpoint.config.get(family.logit_cap) if family.logit_cap else None

        short_VD = weight_VD.bfloat16() if short else None
        return cls(weight_VD, float(divisor), float(cap or 0.0), short_VD)

    @property
    def chunk_tokens(self) -> int:
        """How many tokens' logits are in memory together."""
        return max(1, _CHUNK_LOGITS // len(self.weight_VD))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV in float32."""
        return self._squeeze(hidden_ND.float() @ self.weight_VD.T)

    def both_logits(self, hidden_ND: Tensor, dense_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both models, as far apart as their states are.

        Short products round a logit by more than two models that are near differ in it. So what is
        rounded is the dense model's logit, the same for both, and their difference, which is small.
        """
        if self.short_VD is None:
            return self.logits(hidden_ND), self.logits(dense_ND)

        dense_NV = (dense_ND.bfloat16() @ self.short_VD.T).float()
        apart_ND = hidden_ND.float() - dense_ND.float()
        own_NV = dense_NV + (apart_ND.bfloat16() @ self.short_VD.T).float()
        return self._squeeze(own_NV), self._squeeze(dense_NV)

    def pull_back(self, slope_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Return the slope with respect to the hidden states, given that to the logits."""
        if self.cap:
            slope_NV = slope_NV * (1 - (logits_NV / self.cap) ** 2)
        if self.short_VD is not None:
            return (slope_NV.bfloat16() @ self.short_VD).float() / self.divisor
        return slope_NV @ self.weight_VD / self.divisor

    def _squeeze(self, logits_NV: Tensor) -> Tensor:
        if self.divisor != 1:
            logits_NV = logits_NV / self.divisor
        if self.cap:
            logits_NV = self.cap * torch.tanh(logits_NV / self.cap)
        return logits_NV


def measure_kl(head: Head, hidden_ND: Tensor, dense_ND: Tensor) -> Tensor:
    """Return KL(dense ‖ sparse) of every token in nats, divergence_N."""
    parts = []

    for chunk in _chunks(head, len(hidden_ND)):
        own_NV = torch.log_softmax(head.logits(hidden_ND[chunk]), dim=1)
        dense_NV = torch.log_softmax(head.logits(dense_ND[chunk]), dim=1)
        parts.append(_divergence(own_NV, dense_NV, "forward"))

    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def kl_and_slope(
    head: Head,
    hidden_ND: Tensor,
    dense_ND: Tensor,
    weight_N: Tensor,
    direction: Direction,
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · divergence, and its slope with respect to the hidden states.

    Args:
        head: of both models.
        hidden_ND, dense_ND: last hidden states of the sparse and the dense model, after their norm.
        weight_N: what each token counts.
        direction: ``forward`` is KL(dense ‖ sparse), ``reverse`` is KL(sparse ‖ dense).

    Returns:
        A sum in nats, a scalar, and slope_ND.
    """
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    slope_ND = torch.empty_like(hidden_ND, dtype=torch.float32)

    for chunk in _chunks(head, len(hidden_ND)):
        logits_NV, dense_logits_NV = head.both_logits(hidden_ND[chunk], dense_ND[chunk])
        own_NV = torch.log_softmax(logits_NV, dim=1)
        dense_NV = torch.log_softmax(dense_logits_NV, dim=1)

        divergence_N = _divergence(own_NV, dense_NV, direction)
        total += (weight_N[chunk] * divergence_N).sum()

        if direction == "forward":
            slope_NV = own_NV.exp() - dense_NV.exp()
        else:
            slope_NV = own_NV.exp() * (own_NV - dense_NV - divergence_N[:, None])

        slope_NV *= weight_N[chunk, None]
        slope_ND[chunk] = head.pull_back(slope_NV, logits_NV)

    return total, slope_ND


def _read_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a large matrix a few rows at a time: what passes is small beside what stays."""
    V, D = checkpoint.entries[name].shape
    weight_VD = torch.empty(V, D)

    for start in range(0, V, _ROWS):
        rows = np.arange(start, min(start + _ROWS, V))
        weight_VD[start : start + len(rows)] = torch.from_numpy(checkpoint.read_rows(name, rows))

    return weight_VD


def _divergence(own_NV: Tensor, dense_NV: Tensor, direction: Direction) -> Tensor:
    if direction == "forward":
        return (dense_NV.exp() * (dense_NV - own_NV)).sum(1)
    return (own_NV.exp() * (own_NV - dense_NV)).sum(1)


def _chunks(head: Head, tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, head.chunk_tokens):
        yield slice(start, min(start + head.chunk_tokens, tokens))
