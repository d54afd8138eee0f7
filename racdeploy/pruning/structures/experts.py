"""Removal of whole experts with their rows of the router; as many stay in every block.

The experts are removed that change the block's output least, on the model's own traces, with the
router choosing among those that are left. The new output of a token is computed from the outputs of
all experts, so that the experts that step in are taken into account. Experts are removed one by
one; then single swaps of a removed and a kept one are tried while they help.

``criterion = "magnitude"`` ranks by the router-weighted output norm instead: the mean over an
expert's tokens of its routing share times the norm of its output. Source: REAP (arXiv 2510.13999),
section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from racdeploy.engines.backends.transformers.experts import route
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import list_axes
from racdeploy.pruning.structure.cut import BlockCutContext, narrow_block
from racdeploy.pruning.structure.layout import UnitLayout, part_error
from racdeploy.pruning.structure.prunable_units import PrunableUnits
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "E"
PROBE_BYTES = 256 << 20
"""Memory for the products of all pairs of experts' outputs, which every probe token has."""
PROBE_TOKENS = 16_384
MAX_EXCHANGE_ROUNDS = 4
_CHOICE_BIAS = "exp_probs_b.bias"
_OUTPUT_VALUES = 1 << 25  # of all experts, in memory at a time
_GRID, _NORM_GRID = 2.0**36, 2.0**20  # sums are multiples of 1 / grid: exact, in any order


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    return UnitLayout(SIZE_LETTER, shape.sizes[block]["E"], {SIZE_LETTER: 1}, is_uniform=True)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse an impossible cut with a UsageError."""
    shape = checkpoint.shape
    family = shape.family
    share = structure.kept_share("experts")
    experts = shape.num_experts
    if not experts:
        raise part_error("experts", family, "it has none")

    if shape.config.get("n_group", 1) > 1:
        raise part_error("experts", family, "its router chooses groups of equally many first")

    used = shape.integer(family.gguf_integers["expert_used_count"])
    kept = round(share * experts)
    counts = range(experts - 1, used - 1, -1)
    reachable = ", ".join(f"{count / experts:.3g}" for count in counts[:8])
    remedy = f"choose one of {reachable}" if counts else "leave out --keep experts"

    if kept < used:
        raise UsageError(
            "share-not-reachable",
            f"experts = {share:g} keeps {kept} of {experts} in a block, and the router sends each"
            f" token to {used}",
            remedy=remedy,
        )
    if share < 1 and kept == experts:
        raise UsageError(
            "share-not-reachable", f"experts = {share:g} removes none of {experts}", remedy=remedy
        )


def cut(context: BlockCutContext) -> list[int]:
    """Remove experts of a block; all processes choose the same ones."""
    pair = context.pair
    units = context.choose(ExpertUnits(context.session, pair.sparse_flow, pair.sparse))
    narrow_block(pair, context.layout, units)
    return units


class ExpertUnits(PrunableUnits):
    """Experts of a block as units; ``flow`` has this process's batches before the block."""

    def __init__(self, session: PruningSession, flow: CalibrationPass, block: nn.Module) -> None:
        super().__init__(session.model.shape.num_experts)
        self._arguments = session, flow, block

    @cached_property
    def _norms(self) -> list[float]:
        return measure_expert_norms(*self._arguments)

    @cached_property
    def _probe(self) -> ExpertProbe:
        return ExpertProbe(*self._arguments)

    def sizes(self) -> Tensor:
        """Return ranks by the router-weighted output norm; of equal ones the last ranks lowest."""
        rising = sorted(range(len(self._norms)), key=lambda expert: (self._norms[expert], -expert))
        return self._rank(rising)

    def costs(self) -> Tensor:
        """Return ranks by the change of the output; ties, as of unused experts, by norm."""
        kept, norms = self.kept, self._norms
        self._probe.measure(kept)
        rises = self._probe.compute_rises(kept)
        return self._rank(sorted(rises, key=lambda expert: (rises[expert], norms[expert])))

    def exchange(self) -> None:
        """Swap removed experts for kept ones while the block's output gets nearer to the dense one.

        Starts with the experts of largest norm if these are better than the chosen ones.
        """
        kept = self.kept
        norms = self._norms
        probe = self._probe
        ranked = sorted(range(len(norms)), key=lambda expert: -norms[expert])
        largest = sorted(ranked[: len(kept)])
        kept = min([kept, largest], key=probe.measure)
        change = probe.measure(kept)

        for _ in range(MAX_EXCHANGE_ROUNDS):
            before = kept
            for expert in range(len(norms)):
                if expert in kept:
                    continue

                # Put one back and remove the weakest; a swap counts if the total change falls.
                more = sorted([*kept, expert])
                change_more = probe.measure(more)
                rises = probe.compute_rises(more)
                weakest = min(rises, key=lambda each: (rises[each], norms[each]))
                if change_more + rises[weakest] < change:
                    change = change_more + rises[weakest]
                    kept = [each for each in more if each != weakest]

            if kept == before:
                break

        self.keep(kept)

    def _rank(self, rising: Sequence[int]) -> Tensor:
        rank_U = torch.zeros(len(self.kept_U))
        rank_U[rising] = torch.arange(len(rising), dtype=rank_U.dtype)
        return rank_U


def measure_expert_norms(
    session: PruningSession, flow: CalibrationPass, block: nn.Module
) -> list[float]:
    """Return the router-weighted output norm of each expert; 0 if no token was routed to it."""
    experts: Any = block.get_submodule(session.model.shape.family.experts_module)
    sums_2E = torch.zeros(2, len(experts), dtype=torch.float64)  # of norms, and of tokens

    for index, batch in enumerate(session.calibration_batches):
        routed = flow.expert_input(block, index)

        for number, expert in enumerate(experts):
            token_M = routed.tokens(batch, number)
            with session.model.autocast():
                output_MD = expert(routed.hidden_ND[token_M])

            is_chosen_MK = routed.chosen_NK[token_M] == number
            share_M = (routed.share_NK[token_M] * is_chosen_MK).sum(1)
            norm_M = share_M.float() * output_MD.float().norm(dim=1)
            sums_2E[0, number] += _sum_exactly(norm_M, _NORM_GRID)
            sums_2E[1, number] += len(norm_M)

    session.share.add_up(sums_2E)
    norms_E = sums_2E[0] / sums_2E[1]
    return [float(norm) for norm in norms_E.nan_to_num(0.0)]


@dataclass
class _Part:
    """Probe tokens of one batch, with the outputs of all experts as pairwise products."""

    logits_NE: Tensor
    products_NEE: Tensor  # of the outputs of each pair of experts
    weight_N: Tensor  # of the token: 1 over the energy of the block's output
    whole_NE: Tensor  # routing share of each expert, with all experts
    change_N: Tensor  # of the output, by the experts removed so far
    used_NE: Tensor  # whether a token is routed to a kept expert


class ExpertProbe:
    """Probe tokens of this process, on which changes of a block's output are measured."""

    def __init__(self, session: PruningSession, flow: CalibrationPass, block: nn.Module) -> None:
        self._session = session
        shape = session.model.shape
        family = shape.family
        tensors = family.block_tensors.items()
        biases = [name for name, stored in tensors if stored == _CHOICE_BIAS]
        self._share_out = partial(
            _share_out,
            K=shape.integer(family.gguf_integers["expert_used_count"]),
            norm_topk_prob=bool(shape.config.get("norm_topk_prob", True)),
            bias_E=block.get_parameter(biases[0]).data if biases else None,
            scale=shape.config.get("routed_scaling_factor") or 1.0,
        )
        self._experts: Any = block.get_submodule(family.experts_module)
        self._router = _find_router(family, block)

        E = shape.num_experts
        max_tokens = min(PROBE_TOKENS, PROBE_BYTES // (4 * E * E))
        tokens = sum(batch.tokens for batch in session.all_calibration_batches)
        self._step = -(-tokens // max_tokens)

        self._parts: list[_Part] = []
        for index in range(len(session.calibration_batches)):
            self._parts += self._make_parts(flow, block, index)

    def compute_rises(self, kept: Sequence[int]) -> dict[int, float]:
        """Return the further change of the output by removing each of the experts that are left.

        Only tokens that are routed to an expert change with it, so only these are computed.
        """
        rises_E = torch.zeros(len(self._experts), dtype=torch.float64)
        for part in self._parts:
            for expert in kept:
                others = [other for other in kept if other != expert]
                token_M = part.used_NE[:, expert].nonzero()[:, 0]
                change_M = self._change(part, token_M, others)
                rise_M = (change_M - part.change_N[token_M]) * part.weight_N[token_M]
                rises_E[expert] += _sum_exactly(rise_M, _GRID)

        self._session.share.add_up(rises_E)
        return {expert: float(rises_E[expert]) for expert in kept}

    def measure(self, kept: Sequence[int]) -> float:
        """Route all tokens among the experts that are left; return the change of the output."""
        total = torch.zeros((), dtype=torch.float64)
        for part in self._parts:
            token_N = torch.arange(len(part.logits_NE), device=part.logits_NE.device)
            part.used_NE = self._shares(part, token_N, kept) > 0
            part.change_N = self._change(part, token_N, kept)
            total += _sum_exactly(part.change_N * part.weight_N, _GRID)

        self._session.share.add_up(total)
        return float(total)

    def _shares(self, part: _Part, token_M: Tensor, kept: Sequence[int]) -> Tensor:
        removed = [expert for expert in range(len(self._experts)) if expert not in kept]
        logits_ME = part.logits_NE[token_M]
        logits_ME[:, removed] = -torch.inf
        return self._share_out(logits_ME)

    def _change(self, part: _Part, token_M: Tensor, kept: Sequence[int]) -> Tensor:
        """Return |change|² of the output at some tokens, with only some experts left.

        With d the change of the shares and P the products of outputs it is dᵀ P d.
        """
        delta_ME = self._shares(part, token_M, kept) - part.whole_NE[token_M]
        product_ME = (part.products_NEE[token_M] @ delta_ME[:, :, None])[:, :, 0]
        return (product_ME * delta_ME).sum(1)

    def _make_parts(self, flow: CalibrationPass, block: nn.Module, index: int) -> list[_Part]:
        session = self._session
        batch = self._session.batches[index]
        routed = flow.expert_input(block, index)
        output_ND = flow.output(block, index).flatten(0, 1)
        token_M = routed.tokens(batch, None)[:: self._step]

        E = len(self._experts)
        D = output_ND.shape[1]
        parts = []

        for token_N in torch.split(token_M, max(1, _OUTPUT_VALUES // (E * D))):
            hidden_ND = routed.hidden_ND[token_N]
            with session.model.autocast():
                outputs = [expert(hidden_ND) for expert in self._experts]
                logits_NE = self._router(hidden_ND)

            outputs_NED = torch.stack(outputs, 1).float()
            whole_NE = self._share_out(logits_NE.float())
            energy_N = output_ND[token_N].float().square().sum(1)
            parts.append(
                _Part(
                    logits_NE=logits_NE.float(),
                    products_NEE=outputs_NED @ outputs_NED.mT,
                    weight_N=1 / energy_N,  # relative, since a norm follows
                    whole_NE=whole_NE,
                    change_N=torch.zeros_like(energy_N),
                    used_NE=whole_NE > 0,
                )
            )

        return parts


def _find_router(family: Family, block: nn.Module) -> partial[Tensor]:
    """Return what computes the router's logits; the router module may return other values."""
    routers = []
    for linear in family.never_pruned:
        if list_axes(family, f"{linear}.weight")[0] == "E":
            routers.append(linear)
    (name,) = routers

    weight_ED = block.get_parameter(f"{name}.weight")
    bias_E = dict(block.named_parameters()).get(f"{name}.bias")
    return partial(nn.functional.linear, weight=weight_ED, bias=bias_E)


def _share_out(logits_NE: Tensor, **router: Any) -> Tensor:
    """Return the routing share of each expert at each token; 0 if the token is not routed to it."""
    chosen_NK, share_NK = route(logits_NE, **router)
    return share_NK.new_zeros(logits_NE.shape).scatter_(1, chosen_NK, share_NK)


def _sum_exactly(value_M: Tensor, grid: float) -> Tensor:
    """Return a sum that is the same in any order and for any number of processes."""
    return (value_M.double() * grid).round().sum().cpu() / grid
