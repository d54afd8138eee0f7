"""Several hidden states of one token: they begin as one, pass the blocks together, and end as one.

A walk sees them side by side in the last axis, where others have the one hidden state; a block gets
them one after another. Source: transformers ``Gemma3nTextModel.forward``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from racdeploy.models.checkpoint import Checkpoint

_ENTER = "model.altup_projections"
_LEAVE = "model.altup_unembed_projections"
_LEAST_SQUARE = 1e-5  # of a new hidden state, by which it is divided


class Streams:
    """The hidden states of a token, X of them; nothing stays in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._count = checkpoint.shape.integer(checkpoint.family.streams)

    def begin(self, embedded_ND: torch.Tensor) -> torch.Tensor:
        """Return all hidden states of tokens, side by side, of their embeddings."""
        states = [embedded_ND]
        for stream in range(1, self._count):
            states.append(self._project(_ENTER, stream, embedded_ND, embedded_ND))
        return torch.cat(states, dim=-1)

    def part(self, wide_BTX: torch.Tensor) -> torch.Tensor:
        """Return the hidden states one after another, as a block takes them, (X, B, T, D)."""
        return torch.stack(wide_BTX.chunk(self._count, dim=-1))

    def join(self, apart_XBTD: torch.Tensor) -> torch.Tensor:
        """Return the hidden states side by side."""
        return torch.cat([*apart_XBTD], dim=-1)

    def end(self, norm: nn.Module) -> nn.Module:
        """Return a module that makes one hidden state of all and gives it to the last norm."""
        return _End(partial(self._merge, norm))

    def _merge(self, norm: nn.Module, wide_BTX: torch.Tensor) -> torch.Tensor:
        first_BTD, *others = wide_BTX.chunk(self._count, dim=-1)

        sum_BTD = first_BTD
        for stream, state_BTD in enumerate(others, 1):
            sum_BTD = sum_BTD + self._project(_LEAVE, stream, state_BTD, first_BTD)

        merged: torch.Tensor = norm(sum_BTD / self._count)
        return merged

    def _project(
        self, name: str, stream: int, state_XD: torch.Tensor, like_XD: torch.Tensor
    ) -> torch.Tensor:
        """Return a state times a matrix, as large as another state at each token."""
        weight_DD = torch.from_numpy(self._checkpoint.read(f"{name}.{stream - 1}.weight"))
        made_XD = state_XD @ weight_DD.to(state_XD.device).T

        wanted_X1 = like_XD.square().mean(-1, keepdim=True).sqrt()
        square_X1 = made_XD.square().mean(-1, keepdim=True).clamp(min=_LEAST_SQUARE)
        return made_XD * wanted_X1 / square_X1.sqrt()


class _End(nn.Module):
    def __init__(self, merge: partial[torch.Tensor]) -> None:
        super().__init__()
        self._merge = merge

    def forward(self, wide_BTX: torch.Tensor) -> torch.Tensor:
        return self._merge(wide_BTX)
