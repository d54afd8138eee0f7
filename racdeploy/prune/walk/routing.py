"""What the router of a block sends to its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.statistics import PAD


@dataclass(frozen=True)
class Routed:
    """The tokens of a batch, N with padding, each with the K experts that it chose."""

    hidden_ND: torch.Tensor
    chosen_NK: torch.Tensor
    share_NK: torch.Tensor

    def tokens(self, batch: Batch, expert: int | None) -> torch.Tensor:
        """Return which tokens an expert gets, all at None; padding is no token."""
        real_N = (batch.stream_BT != PAD).flatten().to(self.chosen_NK.device)
        if expert is not None:
            real_N &= (self.chosen_NK == expert).any(1)
        return real_N.nonzero()[:, 0]


def take(batch: Batch, token_M: torch.Tensor) -> Batch:
    """Return some tokens of a batch as sequences of one token each."""
    token_M = token_M.cpu()
    _, T = batch.ids_BT.shape
    return Batch(
        batch.ids_BT.flatten()[token_M][:, None],
        batch.stream_BT.flatten()[token_M][:, None],
        batch.task_B[token_M // T],
        batch.held_out,
    )


@contextmanager
def remember_routing(block: nn.Module, experts: str) -> Iterator[list[Routed]]:
    """Yield a list that fills with what reaches the experts of a block while the body runs."""
    seen: list[Routed] = []

    def remember(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(Routed(*given))

    with block.get_submodule(experts).register_forward_pre_hook(remember):
        yield seen
