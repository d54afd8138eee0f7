"""A block of the dense model and the same of the pruned one, with the batches in front of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from racdeploy.engines.backends.transformers.torch_model import TORCH_DTYPES
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import InputGroups, expert_of
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import InputStatistic


@dataclass
class BlockPair:
    """A dense block, and beside it the one that is cut and pruned."""

    checkpoint: Checkpoint
    index: int  # its number in the dense model
    place: int  # and in the pruned one
    dense: nn.Module
    sparse: nn.Module
    dense_flow: Flow
    sparse_flow: Flow
    kept: dict[str, list[int]] = field(default_factory=dict)  # part → units that stay
    # Linear that lost inputs → mean squares of all that it had.
    narrowed: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)  # calibration tokens of each expert
    sizes: dict[str, int] = field(init=False)  # of the sparse one, by the letters of shapes
    experts: list[int] = field(init=False)  # of the sparse one, by their dense numbers

    def __post_init__(self) -> None:
        self.sizes = dict(self.checkpoint.shape.sizes[self.index])
        self.experts = list(range(self.sizes.get("E", 0)))

    @property
    def input_groups(self) -> InputGroups:
        """Prunable linears of both by the input they share."""
        return self.checkpoint.shape.input_groups[self.index]

    def name(self, inside: str) -> str:
        """Return the name in the pruned model of what has a name inside the sparse block."""
        return f"{self.checkpoint.family.blocks}.{self.place}.{inside}"

    def dense_name(self, inside: str) -> str:
        """Return its name in the dense model."""
        expert = expert_of(inside)
        if expert is not None:
            inside = inside.replace(f".{expert}.", f".{self.experts[expert]}.", 1)
        return f"{self.checkpoint.family.blocks}.{self.index}.{inside}"

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """Return the type of a parameter of the sparse block in the checkpoint."""
        return TORCH_DTYPES[self.checkpoint.entries[self.dense_name(parameter)].dtype]


def gather_inputs(
    session: Session,
    pair: BlockPair,
    group: int,
    full: Sequence[torch.Tensor],  # weights of its linears
    *,
    match: bool,  # whether the drift from the dense input is gathered, too
    final: bool = True,  # whether nothing before it changes any more
) -> InputStatistic:
    """Return the statistic of a group's input, over this process's calibration batches."""
    linears = pair.input_groups[group]
    narrowed = [linear for linear in linears if linear in pair.narrowed and match]
    dense = [pair.dense.get_parameter(f"{linear}.weight") for linear in narrowed]
    statistic = InputStatistic(full[0].shape[1], session.weights_R, full if match else (), dense)

    for index, batch in enumerate(session.fitted):
        statistic.add(  # no names: a batch's inputs are gone before the next one's are made
            pair.sparse_flow.input(pair.sparse, group, index, final=final),
            pair.dense_flow.input(pair.dense, group, index) if match else None,
            batch.stream_BT,
        )

    return statistic
