"""Prune the linears of a block by the recipe's method, in its pattern.

Linears with one statistic are solved together, each in the process that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import set_parameter
from racdeploy.models.conversion import find_conversion
from racdeploy.models.families import find_expert, generalize_expert
from racdeploy.models.shape import ModelShape
from racdeploy.pruning.walk.expert_linears import SolveGroup, gather_groups
from racdeploy.pruning.walk.pair import BlockPair
from racdeploy.pruning.walk.pruned_linear import PrunedLinear
from racdeploy.pruning.walk.relative_error import RelativeError
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.pruning.weights.patterns import (
    ExistingZeros,
    LinearSparsities,
    NOfM,
    Pattern,
    Unstructured,
)
from racdeploy.pruning.weights.refit import prune_and_refit
from racdeploy.pruning.weights.rounding import round_to_grid
from racdeploy.quant import RoundingQuant, explain_misfit, load, load_grid, rounding_quant_of
from racdeploy.quant.grid import GridCodes

GgufLayout = tuple[Tensor | None, Tensor | None]
"""The column at each position of a GGUF file, and a factor, (1, 1), or one for each row, (O, 1)."""
LinearSolution = tuple[Tensor, Tensor, float, GridCodes | None]
"""Pruned weights, their target, the damping, and the codes if they were chosen."""


@dataclass(frozen=True)
class LinearPruner:
    """Prunes linears by the recipe's method, sparsities and format."""

    session: PruningSession
    sparsities: LinearSparsities
    quant: RoundingQuant  # format whose codes are optimized; empty: the export rounds
    keep_existing_zeros: bool  # prune no others: the model is sparse already

    def quant_of(self, pair: BlockPair, linear: str) -> str:
        """Return the format whose codes are optimized for a linear, or an empty string."""
        name = rounding_quant_of(self.quant, pair.dense_name(linear))
        # A cut may leave rows that its blocks do not divide: then the export chooses another one.
        row_length = pair.sparse.get_parameter(f"{linear}.weight").shape[1]
        return "" if name and explain_misfit(load(name), row_length) else name

    def prune_group(
        self, pair: BlockPair, group: int, linears: Sequence[str]
    ) -> dict[str, PrunedLinear]:
        """Prune linears that share an input."""
        # Dense weights, minus the rows and columns of a cut.
        full = {name: pair.sparse.get_parameter(f"{name}.weight") for name in linears}
        pruned: dict[str, PrunedLinear] = {}
        for pieces, statistics in gather_groups(self.session, pair, group, full):
            pruned |= self._prune(pair, pieces, statistics, full)
        return pruned

    def _prune(
        self,
        pair: BlockPair,
        pieces: Sequence[SolveGroup],
        statistics: Sequence[InputStatistic],
        full: Mapping[str, Tensor],
    ) -> dict[str, PrunedLinear]:
        """Prune the linears whose statistics one pass has gathered."""
        costs = {}
        for piece in pieces:
            for linears in piece.work_items:
                costs[linears] = sum(full[linear].numel() for linear in linears)
        share = self.session.share_linears(costs)

        # Add up all sums before solving: so no process waits while another solves.
        for piece, statistic in zip(pieces, statistics, strict=True):
            statistic.reduce(share, piece.linears)

        solved: dict[str, LinearSolution] = {}
        for piece, statistic in zip(pieces, statistics, strict=True):
            patterns = {name: self._pattern(pair, name, full[name]) for name in piece.linears}
            owned = share.list_owned(piece.linears)
            if owned:
                solved |= self._solve(pair, piece, owned, patterns, statistic, full)

        pruned = {}
        match_dense = self.session.settings.match_dense
        for piece, statistic in zip(pieces, statistics, strict=True):
            for linear in piece.linears:
                placeholder = full[linear], full[linear], 0.0, None  # of the owner's shape
                solution = solved.pop(linear, placeholder)
                result = self._describe(pair, piece, linear, statistic, solution)
                pruned[linear] = result.of_owner(share, linear, target=match_dense)
                set_parameter(pair.sparse, f"{linear}.weight", pruned[linear].stored_OI.float())

        return pruned

    def _solve(
        self,
        pair: BlockPair,
        piece: SolveGroup,
        owned: Sequence[str],
        patterns: Mapping[str, Pattern],
        statistic: InputStatistic,
        full: Mapping[str, Tensor],
    ) -> dict[str, LinearSolution]:
        """Solve the linears of a group that this process owns."""
        settings = self.session.settings
        method = plugins.load("prune_methods", settings.method)
        hessian = statistic.hessian(settings.damping)
        indices = [piece.linears.index(linear) for linear in owned]
        matched = statistic.solve_targets(indices, hessian) if settings.match_dense else {}

        solved = {}
        for index, linear in zip(indices, owned, strict=True):
            target_OI = matched.get(index, full[linear])
            live_OI = target_OI * ~hessian.dead_I
            pruned = prune_and_refit(method, live_OI, hessian, patterns[linear], settings)
            weight_OI = pruned.weight_OI
            codes = None

            if name := self.quant_of(pair, linear):
                # GGUF files reorder some columns, and neighbours in the file share a scale.
                layout: GgufLayout = (None, None)
                if "gguf" in load(name).formats:
                    layout = find_gguf_layout(pair.checkpoint.shape, linear, target_OI)
                weight_OI, codes = round_to_grid(pruned, live_OI, hessian, load_grid(name), *layout)

            solved[linear] = weight_OI, target_OI, hessian.damping, codes

        return solved

    def _describe(
        self,
        pair: BlockPair,
        piece: SolveGroup,
        linear: str,
        statistic: InputStatistic,
        solved: LinearSolution,
    ) -> PrunedLinear:
        """Return the pruned linear in its owner; elsewhere a placeholder of its shape."""
        weight_OI, target_OI, damping, codes = solved
        # Codes times a scale need more digits than bfloat16 has.
        quant = self.quant_of(pair, linear)
        stored = torch.float32 if quant else pair.stored_dtype(f"{linear}.weight")
        expert = find_expert(linear)

        return PrunedLinear(
            weight_OI.to(stored).contiguous(),
            target_OI,
            damping,
            RelativeError(self.session.tasks),
            statistic.importance_I,
            statistic.tokens,
            expert_tokens=None if expert is None else pair.expert_tokens[expert],
            pooled=piece.pooled,
            quant=quant,
            codes=codes,
        )

    def _pattern(self, pair: BlockPair, linear: str, weight_OI: Tensor) -> Pattern:
        """Return the pattern of a linear's zeros."""
        if self.keep_existing_zeros:
            return ExistingZeros(weight_OI != 0)

        settings, name = self.session.settings, pair.dense_name(linear)
        settings.check_width(name, weight_OI.shape[1])
        return NOfM(*settings.n_m) if settings.n_m else Unstructured(self.sparsities[name])


def find_gguf_layout(shape: ModelShape, linear: str, weight_OI: Tensor) -> GgufLayout:
    """Return the order of a linear's columns in a GGUF file, and the factors of its rows."""
    parameter, device = f"{generalize_expert(linear)}.weight", weight_OI.device
    family = shape.family
    conversion = find_conversion(
        family.transforms.get(parameter), shape, family.block_tensors[parameter], weight_OI.shape
    )
    order_I, factors = conversion.order_I, conversion.factors
    return (
        None if order_I is None else torch.from_numpy(order_I).to(device),
        torch.from_numpy(math.prod(factors)).to(device) if factors else None,
    )
