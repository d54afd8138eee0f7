"""Tokens that the router of a block sends to its experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.statistics import PAD


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens of a batch, N with padding, each with its K chosen experts and their shares."""

    hidden_ND: Tensor
    chosen_NK: Tensor
    share_NK: Tensor

    def tokens(self, batch: Batch, expert: int | None) -> Tensor:
        """Return the indices of the tokens of an expert, or of all experts at None; no padding."""
        real_N = (batch.segment_BT != PAD).flatten().to(self.chosen_NK.device)
        if expert is not None:
            real_N &= (self.chosen_NK == expert).any(1)
        return real_N.nonzero()[:, 0]


def select_tokens(batch: Batch, token_M: Tensor) -> Batch:
    """Return some tokens of a batch as sequences of one token each."""
    token_M = token_M.cpu()
    _, T = batch.ids_BT.shape
    return Batch(
        batch.ids_BT.flatten()[token_M][:, None],
        batch.segment_BT.flatten()[token_M][:, None],
        batch.task_B[token_M // T],
        batch.held_out,
    )


@contextmanager
def record_routing(block: nn.Module, experts: str) -> Iterator[list[RoutedTokens]]:
    """Yield a list that collects the tokens at the experts of a block, one entry a pass."""
    seen = []

    def remember(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(RoutedTokens(*arguments))

    with block.get_submodule(experts).register_forward_pre_hook(remember):
        yield seen
