"""Prune the experts of a block, each on the tokens that its router sends it.

The two models may route a token differently. What counts for an expert are the tokens that the
sparse model sends it; its target at such a token is what the dense expert makes of the dense
model's hidden values there, whether or not the dense model asked it. So the target is known for
every token, is the dense model's output where both route alike, and no expert learns the work of
another. The router stays as it is.

An expert with too few tokens is pruned on those of all experts: on every token of the block, once,
as if it had been chosen for each. For ``gate_proj`` and ``up_proj`` that is one statistic for all
such experts. ``down_proj`` has one for each still, since channels of different experts are not the
same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from racdeploy.models.families import expert_of
from racdeploy.models.widths import axes, shape
from racdeploy.prune.bounds import EXPERT_BYTES
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.pair import BlockPair
from racdeploy.prune.walk.pruned_linear import PrunedLinear, without_bias
from racdeploy.prune.walk.routing import Routed, take
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import InputStatistic, count_sums

TOKENS_PER_INPUT = 2
"""With fewer, the tokens of all experts give smaller errors; see benchmarks/RESULTS.md."""


@dataclass(frozen=True)
class Piece:
    """Linears of a group that are pruned on one statistic.

    Args:
        linears: names inside the block.
        expert: whose input it is; None: that of the block, or of all its experts.
        pooled: whether the tokens of all experts count, since those of the expert are too few.
    """

    linears: tuple[str, ...]
    expert: int | None = None
    pooled: bool = False

    @property
    def works(self) -> list[tuple[str, ...]]:
        """Return what one process solves at a time: one linear, or all of an expert."""
        alone = self.expert is None
        return [(linear,) for linear in self.linears] if alone else [self.linears]


def count_tokens(session: Session, flow: Flow, block: nn.Module, experts: int) -> list[int]:
    """Return how many calibration tokens each expert of a block gets, over all processes."""
    counts_E = torch.zeros(experts, dtype=torch.float64)

    for index, batch in enumerate(session.fitted):
        routed = flow.routed(block, index)
        real_N = routed.tokens(batch, None)
        stream_N = batch.stream_BT.flatten()[real_N.cpu()]
        counting_N = session.weights_R.cpu()[stream_N] > 0
        chosen_NK = routed.chosen_NK[real_N].cpu()[counting_N]
        counts_E += torch.bincount(chosen_NK.flatten(), minlength=experts)

    session.processes.total(counts_E)
    return [int(count) for count in counts_E]


class ExpertGroup:
    """Linears of the experts of a block that have the same place in each of them."""

    def __init__(
        self,
        session: Session,
        pair: BlockPair,
        wanted: Sequence[str],
        *,
        match: bool,  # whether the target is the dense output
    ) -> None:
        self._session, self._pair = session, pair
        self._wanted = wanted
        family = session.blocks.shape.family
        self._experts = family.experts
        self._is_inner = axes(family, f"{wanted[0]}.weight")[1] != "D"
        self._match = match

    def pieces(self) -> list[Piece]:
        """Return the linears by the statistic that each is pruned on."""
        by_expert = defaultdict[int, list[str]](list)
        for linear in self._wanted:
            by_expert[expert_of(linear) or 0].append(linear)

        family = self._session.blocks.shape.family
        I = shape(family, f"{self._wanted[0]}.weight", self._pair.sizes)[1]
        least = self._session.settings.expert_tokens or TOKENS_PER_INPUT * I
        pieces = []
        pooled = list[str]()

        for expert, linears in by_expert.items():
            too_few = self._pair.tokens[expert] < least
            if too_few and not self._is_inner:
                pooled += linears
            else:
                pieces.append(Piece(tuple(linears), expert, too_few))

        if pooled:
            pieces.append(Piece(tuple(pooled), None, True))
        return pieces

    def split(self, pieces: Sequence[Piece], full: Mapping[str, torch.Tensor]) -> list[list[Piece]]:
        """Return the pieces whose sums are in memory together."""
        parts: list[list[Piece]] = [[]]
        size_bytes = 0

        for piece in pieces:
            outputs = 0
            if self._match:
                outputs = sum(len(full[linear]) for linear in piece.linears)
            own_bytes = 8 * count_sums(full[piece.linears[0]].shape[1], outputs)
            size_bytes += own_bytes
            if parts[-1] and size_bytes > EXPERT_BYTES:
                parts.append([])
                size_bytes = own_bytes
            parts[-1].append(piece)

        return parts

    def gather(
        self, pieces: Sequence[Piece], full: Mapping[str, torch.Tensor]
    ) -> list[InputStatistic]:
        """Return the statistics of some pieces, from one pass of this process's batches."""
        session = self._session
        pair = self._pair

        statistics = []
        for piece in pieces:
            weights = [full[linear] for linear in piece.linears]
            match = weights if self._match else ()
            statistics.append(InputStatistic(weights[0].shape[1], session.weights_R, match))

        for index, batch in enumerate(session.fitted):
            found = pair.sparse_flow.routed(pair.sparse, index)
            wanted = None
            if self._match:
                wanted = pair.dense_flow.routed(pair.dense, index)

            for piece, statistic in zip(pieces, statistics, strict=True):
                token_M = found.tokens(batch, None if piece.pooled else piece.expert)
                own_M1I = self._input(pair.sparse, piece.expert, found, token_M)
                dense_M1I = None
                if wanted is not None:
                    if piece.expert is None:
                        number = None
                    else:
                        number = pair.experts[piece.expert]
                    dense_M1I = self._input(pair.dense, number, wanted, token_M)
                statistic.add(own_M1I, dense_M1I, take(batch, token_M).stream_BT)

        return statistics

    def _input(
        self, block: nn.Module, expert: int | None, routed: Routed, token_M: torch.Tensor
    ) -> torch.Tensor:
        """Return what reaches the group's linears at some tokens, each a sequence of its own."""
        hidden_MD = routed.hidden_ND[token_M]
        if not self._is_inner:
            return hidden_MD[:, None]

        module: Any = block.get_submodule(f"{self._experts}.{expert}")
        with self._session.blocks.computing():
            inner_MF: torch.Tensor = module.inner(hidden_MD)
        return inner_MF[:, None]


def measure_experts(
    session: Session,
    block: nn.Module,
    pruned: Mapping[str, PrunedLinear],
    batch: Batch,
    routed: Routed,
) -> None:
    """Add to the errors of linears of experts what a held-out batch that reached them shows."""
    for expert, linears in _sort(pruned):
        token_M = routed.tokens(batch, expert)
        if not len(token_M):
            continue

        hidden_MD = routed.hidden_ND[token_M]
        tokens = take(batch, token_M)

        for name, linear in linears.items():
            module: Any = block.get_submodule(name)
            owner: Any = block.get_submodule(name.rpartition(".")[0])
            is_inner = module is owner.down_proj

            with session.blocks.computing():
                input_MI = hidden_MD
                if is_inner:
                    input_MI = owner.inner(hidden_MD)
                found_MO = without_bias(module, module(input_MI))

            wanted_MO = input_MI.float() @ linear.target_OI.T
            linear.error.add(found_MO.float()[:, None], wanted_MO[:, None], tokens)


def _sort(pruned: Mapping[str, PrunedLinear]) -> Iterator[tuple[int, dict[str, PrunedLinear]]]:
    """Yield the number of each expert with those of its linears that were pruned."""
    by_expert = defaultdict[int, dict[str, PrunedLinear]](dict)
    for name, linear in pruned.items():
        expert = expert_of(name)
        if expert is not None:
            by_expert[expert][name] = linear
    yield from by_expert.items()
