"""Statistics of a block's linears: of experts, each on the tokens that are routed to it.

The dense and the sparse model may route a token differently. An expert is pruned on the tokens that
the sparse model sends it. Its target at such a token is the dense expert's output for the dense
model's hidden state, even if the dense model routed the token elsewhere. So every token has a
target, it is the dense model's output where both route alike, and no expert learns the work of
another. The router is not changed.

An expert with too few tokens is pruned on every token of the block, as if all had been routed to it
("pooled"). For ``gate_proj`` and ``up_proj`` one statistic serves all such experts. ``down_proj``
still needs one each, since its inputs are the channels of its own expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from racdeploy.models.families import find_expert
from racdeploy.models.widths import list_axes
from racdeploy.pruning.memory_limits import EXPERT_BYTES
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.pair import BlockPair, gather_inputs
from racdeploy.pruning.walk.pruned_linear import PrunedLinear, subtract_bias
from racdeploy.pruning.walk.routing import RoutedTokens, select_tokens
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import InputStatistic, count_sums

MIN_TOKENS_PER_INPUT = 2
"""Below it, pooled tokens give smaller errors; see benchmarks/RESULTS-archive.md."""


@dataclass(frozen=True)
class SolveGroup:
    """Linears that are pruned (solved) on one statistic.

    Args:
        linears: names inside the block.
        expert: index of the expert whose input they share; None for the block's input.
        pooled: True if the statistic uses the tokens of all experts, since this one has too few.
    """

    linears: tuple[str, ...]
    expert: int | None = None
    pooled: bool = False

    @property
    def work_items(self) -> list[tuple[str, ...]]:
        """Return the linears that one process solves together: one each, or all of an expert."""
        is_shared = self.expert is None
        return [(linear,) for linear in self.linears] if is_shared else [self.linears]


def count_expert_tokens(session: PruningSession, pair: BlockPair) -> list[int]:
    """Count the calibration tokens that each expert of a block gets, over all processes."""
    counts_E = torch.zeros(len(pair.experts), dtype=torch.float64)

    for index, batch in enumerate(session.calibration_batches):
        routed = pair.sparse_flow.expert_input(pair.sparse, index)
        chosen_NK = routed.chosen_NK[routed.tokens(batch, None)].cpu()
        counts_E += torch.bincount(chosen_NK.flatten(), minlength=len(counts_E))

    session.share.add_up(counts_E)
    return [int(count) for count in counts_E]


def gather_groups(
    session: PruningSession,
    pair: BlockPair,
    group: int,
    full_weights: Mapping[str, Tensor],  # of its wanted linears, by name inside the block
    *,
    advances: bool = False,  # see gather_inputs; not for experts
) -> Iterator[tuple[Sequence[SolveGroup], Sequence[InputStatistic]]]:
    """Yield the wanted linears of an input group with their statistics.

    Experts are yielded as many at a time as their statistics fit into memory.
    """
    if find_expert(next(iter(full_weights))) is None:
        weights = [*full_weights.values()]
        statistic = gather_inputs(session, pair, group, weights, advances=advances)
        yield [SolveGroup(tuple(full_weights))], [statistic]
        return

    if not pair.expert_tokens:
        pair.expert_tokens = count_expert_tokens(session, pair)

    members = ExpertLinears(session, pair, full_weights)
    for pieces in members.split_by_memory(members.solve_groups()):
        yield pieces, members.gather_statistics(pieces)


@dataclass(frozen=True)
class ExpertLinears:
    """One kind of linear (as ``gate_proj`` and ``up_proj``) of all experts of a block."""

    session: PruningSession
    pair: BlockPair
    full_weights: Mapping[str, Tensor]  # by name inside the block

    @property
    def is_inner(self) -> bool:
        """True if their inputs are the hidden values of an expert."""
        family = self.session.model.shape.family
        return list_axes(family, f"{next(iter(self.full_weights))}.weight")[1] != "D"

    def solve_groups(self) -> list[SolveGroup]:
        """Return the linears, grouped by the statistic that they are pruned on."""
        linears_by_expert = defaultdict[int, list[str]](list)
        for linear in self.full_weights:
            linears_by_expert[find_expert(linear) or 0].append(linear)

        I = next(iter(self.full_weights.values())).shape[1]
        min_tokens = self.session.settings.expert_tokens or MIN_TOKENS_PER_INPUT * I
        pieces = []
        pooled = list[str]()
        for expert, linears in linears_by_expert.items():
            # Pooled experts share one statistic only if their input is the block's.
            too_few = self.pair.expert_tokens[expert] < min_tokens
            if too_few and not self.is_inner:
                pooled += linears
            else:
                pieces.append(SolveGroup(tuple(linears), expert, too_few))

        if pooled:
            pieces.append(SolveGroup(tuple(pooled), None, True))
        return pieces

    def split_by_memory(self, pieces: Sequence[SolveGroup]) -> list[list[SolveGroup]]:
        """Split solve groups into lists whose statistics fit into memory together."""
        parts: list[list[SolveGroup]] = [[]]
        size_bytes = 0

        for piece in pieces:
            outputs = 0
            if self.session.settings.match_dense:
                outputs = sum(len(self.full_weights[linear]) for linear in piece.linears)
            inputs = self.full_weights[piece.linears[0]].shape[1]
            piece_bytes = 8 * count_sums(inputs, outputs)
            size_bytes += piece_bytes
            if parts[-1] and size_bytes > EXPERT_BYTES:
                parts.append([])
                size_bytes = piece_bytes
            parts[-1].append(piece)

        return parts

    def gather_statistics(self, pieces: Sequence[SolveGroup]) -> list[InputStatistic]:
        """Return a statistic per solve group, from one pass over this process's batches."""
        session, pair = self.session, self.pair
        match_dense = session.settings.match_dense

        statistics = []
        for piece in pieces:
            weights = [self.full_weights[linear] for linear in piece.linears]
            matched = weights if match_dense else ()
            statistics.append(InputStatistic(weights[0].shape[1], session.model.device, matched))

        for index, batch in enumerate(session.calibration_batches):
            sparse_routed = pair.sparse_flow.expert_input(pair.sparse, index)
            dense_routed = None
            if match_dense:
                dense_routed = pair.dense_flow.expert_input(pair.dense, index)

            for piece, statistic in zip(pieces, statistics, strict=True):
                token_M = sparse_routed.tokens(batch, None if piece.pooled else piece.expert)
                sparse_M1I = self._input(pair.sparse, piece.expert, sparse_routed, token_M)
                dense_M1I = None
                if dense_routed is not None:
                    # The tokens are the sparse model's, the expert's index the dense one.
                    dense_expert = None if piece.expert is None else pair.experts[piece.expert]
                    dense_M1I = self._input(pair.dense, dense_expert, dense_routed, token_M)
                statistic.add(sparse_M1I, dense_M1I, select_tokens(batch, token_M).segment_BT)

        return statistics

    def _input(
        self, block: nn.Module, expert: int | None, routed: RoutedTokens, token_M: Tensor
    ) -> Tensor:
        """Return the linears' input at some tokens, each as a sequence of one token."""
        hidden_MD = routed.hidden_ND[token_M]
        if not self.is_inner:
            return hidden_MD[:, None]

        experts = self.session.model.shape.family.experts_module
        module: Any = block.get_submodule(f"{experts}.{expert}")
        with self.session.model.autocast():
            inner_MF: Tensor = module.intermediate(hidden_MD)
        return inner_MF[:, None]


def measure_expert_errors(
    session: PruningSession,
    block: nn.Module,
    pruned: Mapping[str, PrunedLinear],
    batch: Batch,
    routed: RoutedTokens,
) -> None:
    """Add a held-out batch to the errors of experts' linears, over the tokens routed to each."""
    linears_by_expert = defaultdict[int, dict[str, PrunedLinear]](dict)
    for name, linear in pruned.items():
        if (expert := find_expert(name)) is not None:
            linears_by_expert[expert][name] = linear

    for expert, linears in linears_by_expert.items():
        token_M = routed.tokens(batch, expert)
        if not len(token_M):
            continue

        hidden_MD = routed.hidden_ND[token_M]
        tokens = select_tokens(batch, token_M)

        for name, linear in linears.items():
            module: Any = block.get_submodule(name)
            owner: Any = block.get_submodule(name.rpartition(".")[0])

            # The hidden values inside an expert exist for its own tokens only.
            with session.model.autocast():
                input_MI = hidden_MD
                if name.endswith(f".{owner.last}"):
                    input_MI = owner.intermediate(hidden_MD)
                output_MO = subtract_bias(module, module(input_MI))

            target_MO = input_MI.float() @ linear.target_OI.T
            linear.error.add(output_MO.float()[:, None], target_MO[:, None], tokens)
