"""Prune the linears of a block by the recipe's method, in its pattern.

Linears with one statistic are solved together, each in the process that owns it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class GgufLayout:
    """Layout of a linear in a GGUF file.

    Args:
        order_I: column at each position of the file; None in the model's order.
        factor_X1: of all rows, (1, 1), or of each row, (O, 1); None if values stay.
    """

    order_I: Tensor | None = None
    factor_X1: Tensor | None = None


@dataclass(frozen=True)
class LinearSolution:
    """Pruned weights and their target, with the codes if they were chosen."""

    weight_OI: Tensor
    target_OI: Tensor
    damping: float
    codes: GridCodes | None = None


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
        solver = _GroupSolver(self, pair, full)

        pruned: dict[str, PrunedLinear] = {}
        for pieces, statistics in gather_groups(self.session, pair, group, full):
            pruned |= solver.prune(pieces, statistics)
        return pruned

    def make_pattern(self, pair: BlockPair, linear: str, weight_OI: Tensor) -> Pattern:
        """Return the pattern of a linear's zeros."""
        if self.keep_existing_zeros:
            return ExistingZeros(weight_OI != 0)

        settings = self.session.settings
        name = pair.dense_name(linear)
        settings.check_width(name, weight_OI.shape[1])
        return NOfM(*settings.n_m) if settings.n_m else Unstructured(self.sparsities[name])


@dataclass(frozen=True)
class _GroupSolver:
    """Solves the linears of a block that share an input."""

    pruner: LinearPruner
    pair: BlockPair
    full: Mapping[str, Tensor]  # weights before pruning, by name inside the block

    @property
    def session(self) -> PruningSession:
        return self.pruner.session

    def prune(
        self, pieces: Sequence[SolveGroup], statistics: Sequence[InputStatistic]
    ) -> dict[str, PrunedLinear]:
        """Prune the linears whose statistics one pass has gathered."""
        costs = {}
        for piece in pieces:
            for linears in piece.work_items:
                costs[linears] = sum(self.full[linear].numel() for linear in linears)
        share = self.session.share_linears(costs)

        # Add up all sums before solving: so no process waits while another solves.
        for piece, statistic in zip(pieces, statistics, strict=True):
            statistic.reduce(share, piece.linears)

        solved: dict[str, LinearSolution] = {}
        for piece, statistic in zip(pieces, statistics, strict=True):
            # In every process, so that all refuse a wrong width alike.
            patterns = {}
            for name in piece.linears:
                patterns[name] = self.pruner.make_pattern(self.pair, name, self.full[name])

            owned = share.list_owned(piece.linears)
            if owned:
                solved |= self._solve(piece, statistic, owned, patterns)

        pruned = {}
        match_dense = self.session.settings.match_dense
        for piece, statistic in zip(pieces, statistics, strict=True):
            for linear in piece.linears:
                full_OI = self.full[linear]
                placeholder = LinearSolution(full_OI, full_OI, damping=0.0)  # of the owner's shape
                solution = solved.pop(linear, placeholder)
                result = self._describe(piece, linear, statistic, solution)
                pruned[linear] = result.of_owner(share, linear, target=match_dense)
                stored_OI = pruned[linear].stored_OI
                set_parameter(self.pair.sparse, f"{linear}.weight", stored_OI.float())

        return pruned

    def _solve(
        self,
        piece: SolveGroup,
        statistic: InputStatistic,
        owned: Sequence[str],
        patterns: Mapping[str, Pattern],
    ) -> dict[str, LinearSolution]:
        """Solve the linears of a group that this process owns."""
        settings = self.session.settings
        hessian = statistic.hessian(settings.damping)
        indices = [piece.linears.index(linear) for linear in owned]
        matched = statistic.solve_targets(indices, hessian) if settings.match_dense else {}

        solved = {}
        for index, linear in zip(indices, owned, strict=True):
            target_OI = matched.get(index, self.full[linear])
            live_OI = target_OI * ~hessian.dead_I
            pruned = prune_and_refit(live_OI, hessian, patterns[linear], settings)
            weight_OI = pruned.weight_OI
            codes = None

            if name := self.pruner.quant_of(self.pair, linear):
                # GGUF files reorder some columns, and neighbours in the file share a scale.
                layout = GgufLayout()
                if "gguf" in load(name).formats:
                    layout = find_gguf_layout(self.pair.checkpoint.shape, linear, target_OI)
                weight_OI, codes = round_to_grid(
                    pruned,
                    live_OI,
                    hessian,
                    load_grid(name),
                    order_I=layout.order_I,
                    factor_X1=layout.factor_X1,
                )

            solved[linear] = LinearSolution(weight_OI, target_OI, hessian.damping, codes)

        return solved

    def _describe(
        self,
        piece: SolveGroup,
        linear: str,
        statistic: InputStatistic,
        solution: LinearSolution,
    ) -> PrunedLinear:
        """Return the pruned linear in its owner; elsewhere a placeholder of its shape."""
        pair = self.pair
        # Codes times a scale need more digits than bfloat16 has.
        quant = self.pruner.quant_of(pair, linear)
        stored = torch.float32 if quant else pair.stored_dtype(f"{linear}.weight")
        expert = find_expert(linear)

        return PrunedLinear(
            stored_OI=solution.weight_OI.to(stored).contiguous(),
            target_OI=solution.target_OI,
            damping=solution.damping,
            error=RelativeError(self.session.tasks),
            importance_I=statistic.importance_I,
            tokens=statistic.tokens,
            expert_tokens=None if expert is None else pair.expert_tokens[expert],
            pooled=piece.pooled,
            quant=quant,
            codes=solution.codes,
        )


def find_gguf_layout(shape: ModelShape, linear: str, weight_OI: Tensor) -> GgufLayout:
    """Return the order of a linear's columns in a GGUF file, and the factors of its rows."""
    family = shape.family
    parameter = f"{generalize_expert(linear)}.weight"
    conversion = find_conversion(
        family.transforms.get(parameter), shape, family.block_tensors[parameter], weight_OI.shape
    )

    order_I = None
    if conversion.order_I is not None:
        order_I = torch.from_numpy(conversion.order_I).to(weight_OI.device)
    factor_X1 = None
    if conversion.factors:
        factor_X1 = torch.from_numpy(math.prod(conversion.factors)).to(weight_OI.device)
    return GgufLayout(order_I, factor_X1)
