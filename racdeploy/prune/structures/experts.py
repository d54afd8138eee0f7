"""Whole experts of a mixture, with their rows of the router; as many stay in every block.

Those stay without whose others the output of the block changes least, on the model's own traces,
where the router chooses among them. What a token's output becomes is computed from the outputs of
all experts, so that one that steps in counts as it is. They go one after the other; then one is put
back and another removed, while that helps. ``criterion = "magnitude"`` takes the router-weighted
output norm instead: the mean over an expert's tokens of its share times the norm of its output.
Source of that norm: REAP (arXiv 2510.13999), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from racdeploy.engines.backends.transformers.experts import route
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import axes
from racdeploy.prune.structure.cut import BlockSite, narrow
from racdeploy.prune.structure.layout import Layout, refuse_part
from racdeploy.prune.structure.units import Units
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import PAD
from racdeploy.recipe import Structure

STEP, SIZE = "block", "E"
PROBE_BYTES = 256 << 20
"""Of products of all pairs of experts' outputs, for each token that is looked at."""
PROBE_TOKENS = 16_384
EXCHANGES = 4  # rounds at most
_OUTPUT_VALUES = 1 << 25  # of all experts at some tokens, in memory at a time
_GRID, _NORM_GRID = 2.0**36, 2.0**20  # sums go in steps of 1 over it: exactly, in any order


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    return Layout(SIZE, shape.num_experts, {SIZE: 1}, alike=True)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    shape = checkpoint.shape
    family = shape.family
    share = structure.share("experts")
    experts = shape.num_experts
    if not experts:
        raise refuse_part("experts", family, "it has none")

    used = shape.integer(family.integers["expert_used_count"])
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


def cut(site: BlockSite) -> list[int]:
    """Remove experts of a block; each process chooses the same."""
    pair = site.pair
    units = site.choose(ExpertUnits(site.session, pair.sparse_flow, pair.sparse))
    narrow(pair, site.layout, units)
    return units


class ExpertUnits(Units):
    """The experts of a block; ``flow`` has this process's batches in front of it."""

    def __init__(self, session: Session, flow: Flow, block: nn.Module) -> None:
        super().__init__(session.blocks.shape.num_experts)
        self._given = session, flow, block

    @cached_property
    def _norms(self) -> list[float]:
        return measure_norms(*self._given)

    @cached_property
    def _probe(self) -> Probe:
        return Probe(*self._given)

    def sizes(self) -> torch.Tensor:
        """Return ranks by the router-weighted output norm; of equal ones the last is least."""
        rising = sorted(range(len(self._norms)), key=lambda expert: (self._norms[expert], -expert))
        return self._rank(rising)

    def costs(self) -> torch.Tensor:
        """Return ranks by the change of the output; where no token of the probe tells, by norm."""
        left, norms = self.kept, self._norms
        self._probe.measure(left)
        rises = self._probe.without_each(left)
        return self._rank(sorted(rises, key=lambda expert: (rises[expert], norms[expert])))

    def exchange(self) -> None:
        """Begin with the largest if they change less; put one back and remove another."""
        left = self.kept
        norms = self._norms
        probe = self._probe
        by_norm = sorted(range(len(norms)), key=lambda expert: -norms[expert])
        largest = sorted(by_norm[: len(left)])
        left = min([left, largest], key=probe.measure)
        change = probe.measure(left)

        for _ in range(EXCHANGES):
            before = left
            for expert in range(len(norms)):
                if expert in left:
                    continue

                more = sorted([*left, expert])
                change_more = probe.measure(more)
                rises = probe.without_each(more)
                other = min(rises, key=lambda each: (rises[each], norms[each]))
                if change_more + rises[other] < change:
                    change = change_more + rises[other]
                    left = [each for each in more if each != other]

            if left == before:
                break

        self.keep(left)

    def _rank(self, rising: Sequence[int]) -> torch.Tensor:
        rank_U = torch.zeros(len(self.kept_U))
        rank_U[rising] = torch.arange(len(rising), dtype=rank_U.dtype)
        return rank_U


def measure_norms(session: Session, flow: Flow, block: nn.Module) -> list[float]:
    """Return the router-weighted output norm of each expert; 0 where no token chose it."""
    experts: Any = block.get_submodule(session.blocks.shape.family.experts)
    sums_2E = torch.zeros(2, len(experts), dtype=torch.float64)  # of norms, and of tokens

    for index, batch in enumerate(session.fitted):
        routed = flow.routed(block, index)
        stream_N = batch.stream_BT.flatten()

        for number, expert in enumerate(experts):
            token_M = routed.tokens(batch, number)
            with session.blocks.computing():
                output_MD = expert(routed.hidden_ND[token_M])

            is_own_MK = routed.chosen_NK[token_M] == number
            share_M = (routed.share_NK[token_M] * is_own_MK).sum(1)
            norm_M = share_M.float() * output_MD.float().norm(dim=1)
            stream_M = stream_N[token_M.cpu()].to(session.weights_R.device)
            weight_M = session.weights_R[stream_M]
            sums_2E[0, number] += _sum_exactly(norm_M * weight_M, _NORM_GRID)
            sums_2E[1, number] += _sum_exactly(weight_M, _NORM_GRID)

    session.processes.total(sums_2E)
    norms_E = sums_2E[0] / sums_2E[1]
    return [float(norm) for norm in norms_E.nan_to_num(0.0)]


@dataclass
class _Part:
    """Tokens of one batch that are looked at: n of them, and what all experts make of each."""

    logits_NE: torch.Tensor
    products_NEE: torch.Tensor  # of the outputs of two experts
    weight_N: torch.Tensor  # of the token, by the energy of the block's output there
    whole_NE: torch.Tensor  # share of each expert while all are there
    change_N: torch.Tensor  # by those that went
    used_NE: torch.Tensor  # whether a token chooses an expert among those that are left


class Probe:
    """Tokens of this process on which the change of a block's output is measured."""

    def __init__(self, session: Session, flow: Flow, block: nn.Module) -> None:
        self._session = session
        shape = session.blocks.shape
        family = shape.family
        self._K = shape.integer(family.integers["expert_used_count"])
        self._normed = bool(shape.config.get("norm_topk_prob", True))
        self._experts: Any = block.get_submodule(family.experts)
        self._router = _find_router(family, block)

        E = len(self._router.weight)
        most = min(PROBE_TOKENS, PROBE_BYTES // (4 * E * E))
        tokens = sum(int((batch.stream_BT != PAD).sum()) for batch in session.everyones)
        self._step = -(-tokens // most)

        self._parts: list[_Part] = []
        for index in range(len(session.fitted)):
            self._parts += self._look(flow, block, index)

    def without_each(self, left: Sequence[int]) -> dict[int, float]:
        """Return by how much more the output changes if one of those that are left goes, too."""
        rises_E = torch.zeros(len(self._experts), dtype=torch.float64)
        for part in self._parts:
            for expert in left:
                others = [other for other in left if other != expert]
                token_M = part.used_NE[:, expert].nonzero()[:, 0]
                change_M = self._change(part, token_M, others)
                rise_M = (change_M - part.change_N[token_M]) * part.weight_N[token_M]
                rises_E[expert] += _sum_exactly(rise_M, _GRID)

        self._session.processes.total(rises_E)
        return {expert: float(rises_E[expert]) for expert in left}

    def measure(self, left: Sequence[int]) -> float:
        """Let the router choose among those that are left; return what that changes."""
        total = torch.zeros((), dtype=torch.float64)
        for part in self._parts:
            token_N = torch.arange(len(part.logits_NE), device=part.logits_NE.device)
            part.used_NE = self._shares(part, token_N, left) > 0
            part.change_N = self._change(part, token_N, left)
            total += _sum_exactly(part.change_N * part.weight_N, _GRID)

        self._session.processes.total(total)
        return float(total)

    def _shares(self, part: _Part, token_M: torch.Tensor, left: Sequence[int]) -> torch.Tensor:
        gone = [expert for expert in range(len(self._experts)) if expert not in left]
        logits_ME = part.logits_NE[token_M]
        logits_ME[:, gone] = -torch.inf
        return _share_out(logits_ME, self._K, normed=self._normed)

    def _change(self, part: _Part, token_M: torch.Tensor, left: Sequence[int]) -> torch.Tensor:
        """Return |change|² of the output at some tokens where only some experts are left."""
        delta_ME = self._shares(part, token_M, left) - part.whole_NE[token_M]
        product_ME = (part.products_NEE[token_M] @ delta_ME[:, :, None])[:, :, 0]
        return (product_ME * delta_ME).sum(1)

    def _look(self, flow: Flow, block: nn.Module, index: int) -> list[_Part]:
        session = self._session
        batch = self._session.batches[index]
        routed = flow.routed(block, index)
        output_ND = flow.output(block, index).flatten(0, 1)
        token_M = routed.tokens(batch, None)[:: self._step]

        E = len(self._experts)
        D = output_ND.shape[1]
        parts = []

        for token_N in torch.split(token_M, max(1, _OUTPUT_VALUES // (E * D))):
            hidden_ND = routed.hidden_ND[token_N]
            with session.blocks.computing():
                outputs = [expert(hidden_ND) for expert in self._experts]
                logits_NE = self._router(hidden_ND)

            outputs_NED = torch.stack(outputs, 1).float()
            whole_NE = _share_out(logits_NE.float(), self._K, normed=self._normed)
            stream_N = batch.stream_BT.flatten()[token_N.cpu()]
            weight_N = session.weights_R[stream_N.to(session.weights_R.device)]
            energy_N = output_ND[token_N].float().square().sum(1)
            parts.append(
                _Part(
                    logits_NE.float(),
                    outputs_NED @ outputs_NED.mT,
                    weight_N / energy_N,  # norms divide by the size of a token
                    whole_NE,
                    torch.zeros_like(energy_N),
                    whole_NE > 0,
                )
            )

        return parts


def _find_router(family: Family, block: nn.Module) -> nn.Linear:
    """Return a linear that computes the router's logits, whatever the module itself returns."""
    (name,) = [each for each in family.kept if axes(family, f"{each}.weight")[0] == "E"]
    weight_ED = block.get_parameter(f"{name}.weight")
    bias = dict(block.named_parameters()).get(f"{name}.bias")

    E, D = weight_ED.shape
    router = nn.Linear(D, E, bias=bias is not None, device="meta")
    router.weight = nn.Parameter(weight_ED.data, requires_grad=False)
    if bias is not None:
        router.bias = nn.Parameter(bias.data, requires_grad=False)
    return router


def _share_out(logits_NE: torch.Tensor, K: int, *, normed: bool) -> torch.Tensor:
    """Return the share of each expert of a token; 0 of those that it does not choose."""
    chosen_NK, share_NK = route(logits_NE, K, normed=normed)
    return torch.zeros_like(share_NK.new_empty(logits_NE.shape)).scatter_(1, chosen_NK, share_NK)


def _sum_exactly(value_M: torch.Tensor, grid: float) -> torch.Tensor:
    """Return a sum that does not depend on which process adds what, or in which order."""
    return (value_M.double() * grid).round().sum().cpu() / grid
