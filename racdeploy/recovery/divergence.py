"""KL divergence between the next-token distributions of two models, and its gradient.

Both models are given by their last hidden states: a few hundred numbers per token in place of the
logits. The gradient with respect to the hidden states is written out by hand, so that autograd
keeps no logits: a chunk of tokens is in memory at a time.

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
_READ_ROWS = 4096  # of the projection at a time
_CHUNK_LOGITS = 1 << 22  # 16 MB in float32, of which there are four at a time


@dataclass(frozen=True)
class LMHead:
    """The output projection (``lm_head``), which neither pruning nor recovery changes.

    ``weight_VD`` is float32; ``bfloat16_VD`` is a bfloat16 copy where products may be bfloat16.
    """

    weight_VD: Tensor
    logit_divisor: float = 1.0  # of the logits, as Granite has
    softcap: float = 0.0  # Gemma's softcap: cap · tanh(logits / cap); 0 is none
    bfloat16_VD: Tensor | None = None

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device, *, bfloat16: bool = False
    ) -> LMHead:
        """Read the projection of a checkpoint; ``short`` computes gradients in bfloat16."""
        family = checkpoint.family
        name = family.embedding if checkpoint.tied else "lm_head.weight"
        weight_VD = _read_rows(checkpoint, name).to(device)

        scaling = family.scaling
        divisor = checkpoint.shape.setting(scaling.logit_divisor) if scaling.logit_divisor else 1.0
        cap = checkpoint.config.get(scaling.logit_cap) if scaling.logit_cap else None

        bfloat16_VD = weight_VD.bfloat16() if bfloat16 else None
        return cls(weight_VD, float(divisor), float(cap or 0.0), bfloat16_VD)

    @property
    def chunk_tokens(self) -> int:
        """Number of tokens whose logits are in memory at a time."""
        return max(1, _CHUNK_LOGITS // len(self.weight_VD))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV in float32."""
        return self._squeeze(hidden_ND.float() @ self.weight_VD.T)

    def both_logits(self, hidden_ND: Tensor, dense_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return own_NV and dense_NV, the logits of both models.

        In bfloat16 the rounding of a logit exceeds the difference of two similar models. So the
        dense logits are rounded once, for both, and the small difference is computed by itself.
        """
        if self.bfloat16_VD is None:
            return self.logits(hidden_ND), self.logits(dense_ND)

        dense_NV = (dense_ND.bfloat16() @ self.bfloat16_VD.T).float()
        difference_ND = hidden_ND.float() - dense_ND.float()
        sparse_NV = dense_NV + (difference_ND.bfloat16() @ self.bfloat16_VD.T).float()
        return self._squeeze(sparse_NV), self._squeeze(dense_NV)

    def backward(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """Return the gradient of the hidden states, given that of the logits."""
        if self.softcap:
            gradient_NV = gradient_NV * (1 - (logits_NV / self.softcap) ** 2)
        if self.bfloat16_VD is not None:
            return (gradient_NV.bfloat16() @ self.bfloat16_VD).float() / self.logit_divisor
        return gradient_NV @ self.weight_VD / self.logit_divisor

    def _squeeze(self, logits_NV: Tensor) -> Tensor:
        if self.logit_divisor != 1:
            logits_NV = logits_NV / self.logit_divisor
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def measure_kl(head: LMHead, hidden_ND: Tensor, dense_ND: Tensor) -> Tensor:
    """Return kl_N, the KL(dense ‖ sparse) of every token in nats."""
    parts = []

    for chunk in chunks(head, len(hidden_ND)):
        sparse_NV = torch.log_softmax(head.logits(hidden_ND[chunk]), dim=1)
        dense_NV = torch.log_softmax(head.logits(dense_ND[chunk]), dim=1)
        parts.append(_divergence(sparse_NV, dense_NV, "forward"))

    return torch.cat(parts) if parts else hidden_ND.new_zeros(0)


def kl_and_gradient(
    head: LMHead,
    hidden_ND: Tensor,
    dense_ND: Tensor,
    weight_N: Tensor,
    direction: Direction,
) -> tuple[Tensor, Tensor]:
    """Return Σ weight · KL over tokens, and its gradient with respect to the hidden states.

    Args:
        head: of both models.
        hidden_ND, dense_ND: last hidden states of the sparse and the dense model, after their norm.
        weight_N: weight of each token in the sum.
        direction: ``forward`` is KL(dense ‖ sparse), ``reverse`` is KL(sparse ‖ dense).

    Returns:
        The sum in nats, a scalar, and gradient_ND.
    """
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    gradient_ND = torch.empty_like(hidden_ND, dtype=torch.float32)

    for chunk in chunks(head, len(hidden_ND)):
        logits_NV, dense_logits_NV = head.both_logits(hidden_ND[chunk], dense_ND[chunk])
        sparse_NV = torch.log_softmax(logits_NV, dim=1)
        dense_NV = torch.log_softmax(dense_logits_NV, dim=1)

        divergence_N = _divergence(sparse_NV, dense_NV, direction)
        total += (weight_N[chunk] * divergence_N).sum()

        # Gradients of a softmax's KL with respect to its logits, forward and reverse.
        if direction == "forward":
            gradient_NV = sparse_NV.exp() - dense_NV.exp()
        else:
            gradient_NV = sparse_NV.exp() * (sparse_NV - dense_NV - divergence_N[:, None])

        gradient_NV *= weight_N[chunk, None]
        gradient_ND[chunk] = head.backward(gradient_NV, logits_NV)

    return total, gradient_ND


def _read_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a large matrix a few rows at a time, to convert it without a second copy."""
    V, D = checkpoint.entries[name].shape
    weight_VD = torch.empty(V, D)

    for start in range(0, V, _READ_ROWS):
        rows = np.arange(start, min(start + _READ_ROWS, V))
        weight_VD[start : start + len(rows)] = torch.from_numpy(checkpoint.read_rows(name, rows))

    return weight_VD


def _divergence(sparse_NV: Tensor, dense_NV: Tensor, direction: Direction) -> Tensor:
    if direction == "forward":
        return (dense_NV.exp() * (dense_NV - sparse_NV)).sum(1)
    return (sparse_NV.exp() * (sparse_NV - dense_NV)).sum(1)


def chunks(head: LMHead, tokens: int) -> Iterator[slice]:
    """Yield the parts of the tokens whose logits are in memory together."""
    for start in range(0, tokens, head.chunk_tokens):
        yield slice(start, min(start + head.chunk_tokens, tokens))
