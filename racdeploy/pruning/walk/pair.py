"""A dense block and its pruned counterpart, with the batches before each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from racdeploy.engines.backends.transformers.torch_model import TORCH_DTYPES
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import InputGroups, find_expert
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import InputStatistic


@dataclass
class BlockPair:
    """A dense block and the sparse block that is cut and pruned from it."""

    checkpoint: Checkpoint
    dense_index: int  # in the dense model
    new_index: int  # in the pruned model, where removed blocks do not count
    dense: nn.Module
    sparse: nn.Module
    dense_flow: CalibrationPass
    sparse_flow: CalibrationPass
    kept_units: dict[str, list[int]] = field(default_factory=dict)  # structure → units that stay
    # Linear that lost inputs → mean squares of all its dense inputs.
    narrowed_importance: dict[str, Tensor] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)  # calibration tokens of each expert
    sizes: dict[str, int] = field(init=False)  # of the sparse block, by the letters of shapes
    experts: list[int] = field(init=False)  # of the sparse block, by their dense indices

    def __post_init__(self) -> None:
        self.sizes = dict(self.checkpoint.shape.sizes[self.dense_index])
        self.experts = list(range(self.sizes["E"]))

    @property
    def input_groups(self) -> InputGroups:
        """Prunable linears of both blocks, grouped by the input they share."""
        return self.checkpoint.shape.input_groups[self.dense_index]

    def new_name(self, inside: str) -> str:
        """Return the full name in the pruned model of a tensor or module of the sparse block."""
        return f"{self.checkpoint.family.blocks}.{self.new_index}.{inside}"

    def dense_name(self, inside: str) -> str:
        """Return the full name in the dense model, with the expert's dense index."""
        expert = find_expert(inside)
        if expert is not None:
            inside = inside.replace(f".{expert}.", f".{self.experts[expert]}.", 1)
        return f"{self.checkpoint.family.blocks}.{self.dense_index}.{inside}"

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Return the checkpoint's dtype of a parameter of the sparse block."""
        return TORCH_DTYPES[self.checkpoint.entries[self.dense_name(parameter)].dtype]


def gather_inputs(
    session: PruningSession,
    pair: BlockPair,
    group: int,
    weights: Sequence[Tensor],  # of its linears
    *,
    is_final: bool = True,  # nothing before the group changes any more
    advances: bool = False,  # nothing in the block changes, and no other group is gathered later
) -> InputStatistic:
    """Gather the statistic of a group's input over this process's calibration batches."""
    linears = pair.input_groups[group]
    match_dense = session.settings.match_dense
    narrowed = [linear for linear in linears if linear in pair.narrowed_importance and match_dense]
    dense = [pair.dense.get_parameter(f"{linear}.weight") for linear in narrowed]
    statistic = InputStatistic(
        weights[0].shape[1], session.model.device, weights if match_dense else (), dense
    )

    def sparse_input(index: int) -> Tensor:
        flow = pair.sparse_flow
        if advances:
            return flow.linear_input_and_advance(pair.sparse, group, index)
        return flow.linear_input(pair.sparse, group, index, is_final=is_final)

    for index, batch in enumerate(session.calibration_batches):
        statistic.add(  # no variables, so that a batch's inputs are freed before the next
            sparse_input(index),
            pair.dense_flow.linear_input(pair.dense, group, index) if match_dense else None,
            batch.segment_BT,
        )

    return statistic
