"""Prune the linears of a block: in the recipe's pattern, by its method, on one statistic each.

Those of one statistic are solved together, each linear in the process that owns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from racdeploy import plugins
from racdeploy.models.families import expert_of, generalize
from racdeploy.models.reordering import order_columns
from racdeploy.models.shape import ModelShape
from racdeploy.prune.walk.blocks import put
from racdeploy.prune.walk.experts import ExpertGroup, Piece, count_tokens
from racdeploy.prune.walk.held_out import RelativeError
from racdeploy.prune.walk.pair import BlockPair, gather_inputs
from racdeploy.prune.walk.pruned_linear import PrunedLinear
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import InputStatistic
from racdeploy.prune.weights.patterns import AsBefore, Pattern, make_pattern
from racdeploy.prune.weights.refit import prune_and_refit
from racdeploy.prune.weights.rounding import round_to_grid
from racdeploy.prune.weights.shares import Shares
from racdeploy.quant import Codes, as_grid, codes_of

Solved = tuple[torch.Tensor, torch.Tensor, float]
"""Pruned weights, their target, and the damping."""


class LinearPruner:
    """What a recipe says of how linears are pruned."""

    def __init__(
        self,
        session: Session,
        shares: Shares,
        quant: Codes,  # whose codes are chosen; empty: the export rounds
        *,
        keeps_own_zeros: bool,  # of a sparse model, which gets no others
    ) -> None:
        self.session, self.shares, self.quant = session, shares, quant
        self._keeps_own_zeros = keeps_own_zeros
        self._method = plugins.load("methods", session.settings.method)

    def quant_of(self, pair: BlockPair, linear: str) -> str:
        """Return the format whose codes a linear gets, or an empty string."""
        return codes_of(self.quant, pair.dense_name(linear))

    def prune_group(
        self, pair: BlockPair, group: int, linears: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears that share an input."""
        # Dense still, but for what a cut took away.
        full = {name: pair.sparse.get_parameter(f"{name}.weight") for name in linears}
        if expert_of(linears[0]) is not None:
            return self._prune_experts(pair, linears, full)

        match = self.session.settings.match_dense
        statistic = gather_inputs(self.session, pair, group, [*full.values()], match=match)
        return self._prune(pair, [Piece(tuple(linears))], [statistic], full)

    def _prune_experts(
        self, pair: BlockPair, linears: Sequence[str], full: Mapping[str, torch.Tensor]
    ) -> dict[str, PrunedLinear]:
        """Prune linears of experts, as many as their sums leave memory for at a time."""
        if not pair.tokens:
            experts = len(pair.experts)
            pair.tokens = count_tokens(self.session, pair.sparse_flow, pair.sparse, experts)

        match = self.session.settings.match_dense
        members = ExpertGroup(self.session, pair, linears, match=match)

        pruned: dict[str, PrunedLinear] = {}
        for pieces in members.split(members.pieces(), full):
            statistics = members.gather(pieces, full)
            pruned |= self._prune(pair, pieces, statistics, full)
        return pruned

    def _prune(
        self,
        pair: BlockPair,
        pieces: Sequence[Piece],
        statistics: Sequence[InputStatistic],
        full: Mapping[str, torch.Tensor],
    ) -> dict[str, PrunedLinear]:
        """Prune what one pass has gathered the statistics of."""
        processes = self.session.processes
        works = [work for piece in pieces for work in piece.works]
        costs = [sum(full[linear].numel() for linear in work) for work in works]
        owners: dict[str, int] = {}
        for work, owner in zip(works, processes.owners(costs), strict=True):
            owners |= dict.fromkeys(work, owner)

        # First all sums, then all solutions: no process waits for another's.
        for piece, statistic in zip(pieces, statistics, strict=True):
            statistic.share(processes, [owners[linear] for linear in piece.linears])

        solved: dict[str, Solved] = {}
        for piece, statistic in zip(pieces, statistics, strict=True):
            patterns = {name: self._pattern(pair, name, full[name]) for name in piece.linears}
            own = [name for name in piece.linears if owners[name] == processes.rank]
            if own:
                solved |= self._solve(pair, piece, own, patterns, statistic, full)

        pruned = {}
        match = self.session.settings.match_dense
        for piece, statistic in zip(pieces, statistics, strict=True):
            for linear in piece.linears:
                nothing = full[linear], full[linear], 0.0  # of the same shape
                solution = solved.pop(linear, nothing)
                found = self._describe(pair, piece, linear, statistic, solution)
                pruned[linear] = found.spread(processes, owners[linear], target=match)
                put(pair.sparse, f"{linear}.weight", pruned[linear].stored_OI.float())

        return pruned

    def _solve(
        self,
        pair: BlockPair,
        piece: Piece,
        own: Sequence[str],
        patterns: Mapping[str, Pattern],
        statistic: InputStatistic,
        full: Mapping[str, torch.Tensor],
    ) -> dict[str, Solved]:
        """Return those linears of a piece that this process owns."""
        settings = self.session.settings
        hessian = statistic.hessian(settings.damping)
        targets = [full[linear] for linear in piece.linears]
        indices = [piece.linears.index(linear) for linear in own]
        matched = statistic.targets(indices, hessian) if settings.match_dense else {}

        solved = {}
        for index, linear in zip(indices, own, strict=True):
            target_OI = matched.get(index, targets[index])
            live_OI = target_OI * ~hessian.dead_I
            pruned = prune_and_refit(self._method, live_OI, hessian, patterns[linear], settings)
            weight_OI = pruned.weight_OI

            if name := self.quant_of(pair, linear):
                quant = as_grid(name)
                is_gguf = "gguf" in quant.FORMATS
                order_I = None
                if is_gguf:
                    order_I = find_order(pair.checkpoint.shape, linear, target_OI)
                weight_OI = round_to_grid(pruned, live_OI, hessian, quant, order_I)

            solved[linear] = weight_OI, target_OI, hessian.damping

        return solved

    def _describe(
        self,
        pair: BlockPair,
        piece: Piece,
        linear: str,
        statistic: InputStatistic,
        solved: Solved,
    ) -> PrunedLinear:
        """Return a linear as its owner solved it; elsewhere one of its shape."""
        weight_OI, target_OI, damping = solved
        # Codes times a scale need more digits than bfloat16 has.
        has_codes = self.quant_of(pair, linear)
        if has_codes:
            stored = torch.float32
        else:
            stored = pair.stored_dtype(f"{linear}.weight")
        expert = expert_of(linear)

        return PrunedLinear(
            weight_OI.to(stored).contiguous(),
            target_OI,
            damping,
            RelativeError(self.session.tasks),
            statistic.importance_I,
            round(statistic.weight),
            routed=None if expert is None else pair.tokens[expert],
            pooled=piece.pooled,
        )

    def _pattern(self, pair: BlockPair, linear: str, weight_OI: torch.Tensor) -> Pattern:
        """Return the zeros that a linear shall have."""
        if self._keeps_own_zeros:
            return AsBefore(weight_OI != 0)

        settings, name = self.session.settings, pair.dense_name(linear)
        settings.check_width(name, weight_OI.shape[1])
        return make_pattern(self.shares[name], settings.kept_of_linear(name))


def find_order(shape: ModelShape, linear: str, weight_OI: torch.Tensor) -> torch.Tensor | None:
    """Return which column of a linear comes at each place of a GGUF file, if others do."""
    transform = shape.family.transforms.get(f"{generalize(linear)}.weight")
    order_I = order_columns(transform, shape, weight_OI.shape[1])
    return None if order_I is None else torch.from_numpy(order_I).to(weight_OI.device)
