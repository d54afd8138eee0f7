"""AltUp of Gemma 3n: several parallel hidden states of a token between first and last block.

The walk holds them concatenated in the last axis, in place of the one hidden state of other
families; a block takes them stacked. Source: transformers ``Gemma3nTextModel.forward``; AltUp:
arXiv 2301.13310.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from racdeploy.models.checkpoint import Checkpoint

_PROJECTIONS = "model.altup_projections"
_UNEMBED_PROJECTIONS = "model.altup_unembed_projections"
_MIN_SQUARE = 1e-5  # mean square of a projected state, by whose root it is divided


class AltUp:
    """Expands embeddings to X parallel hidden states and merges these; matrices are read on use."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        altup = checkpoint.family.altup
        assert altup, "only a family with AltUp has hidden states beside each other"
        self._count = checkpoint.shape.integer(altup.inputs)

    def expand(self, embedded_ND: Tensor) -> Tensor:
        """Return the initial hidden states of token embeddings, concatenated."""
        projected = (
            self._project(_PROJECTIONS, number, embedded_ND, embedded_ND)
            for number in range(1, self._count)
        )
        return torch.cat([embedded_ND, *projected], dim=-1)

    def split(self, wide_BTX: Tensor) -> Tensor:
        """Return the hidden states stacked, as a block takes them, (X, B, T, D)."""
        return torch.stack(wide_BTX.chunk(self._count, dim=-1))

    def concatenate(self, stacked_XBTD: Tensor) -> Tensor:
        """Return the hidden states concatenated, (B, T, X · D)."""
        return torch.cat([*stacked_XBTD], dim=-1)

    def merge(self, norm: nn.Module, wide_BTX: Tensor) -> Tensor:
        """Merge the hidden states into one and apply the last norm."""
        first_BTD, *others = wide_BTX.chunk(self._count, dim=-1)

        sum_BTD = first_BTD
        for number, state_BTD in enumerate(others, 1):
            sum_BTD = sum_BTD + self._project(_UNEMBED_PROJECTIONS, number, state_BTD, first_BTD)

        merged: Tensor = norm(sum_BTD / self._count)
        return merged

    def _project(self, name: str, number: int, state_XD: Tensor, reference_XD: Tensor) -> Tensor:
        """Project a hidden state and scale it, token by token, to the size of a reference.

        ``number``: index of the hidden state; 0 has no matrix.
        """
        weight_DD = torch.from_numpy(self._checkpoint.read(f"{name}.{number - 1}.weight"))
        projected_XD = state_XD @ weight_DD.to(state_XD.device).T

        size_X1 = reference_XD.square().mean(-1, keepdim=True).sqrt()
        square_X1 = projected_XD.square().mean(-1, keepdim=True).clamp(min=_MIN_SQUARE)
        return projected_XD * size_X1 / square_X1.sqrt()
