"""What the removal of each expert of a block costs, as pruning estimates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from racdeploy import plugins
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.batches import make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import PAD
from racdeploy.recipe import Pruning
from racdeploy.traces.trace import Trace


def estimate_costs(
    dense: Checkpoint, traces: Sequence[Trace], folder: Path, number: int
) -> tuple[Any, Sequence[float], Callable[[], torch.Tensor]]:
    """Return a loaded block, which may be changed, the cost of each of its experts, and a function
    that computes the block's outputs at all tokens, (N, D), from the embedding.
    """
    batches = make_batches(traces, ["gcd"], held_out=False)
    blocks = BlockwiseModel(dense)
    session = PruningSession(blocks, batches, batches, Pruning(), folder)
    flow = CalibrationPass(blocks, batches, folder, "found")
    for index, hidden_BTD in enumerate(blocks.embed(batches)):
        flow.hidden[index] = hidden_BTD

    block: Any = blocks.load_block(number)
    experts = range(dense.shape.num_experts)
    probe = plugins.load("structures", "experts").ExpertProbe(session, flow, block)
    probe.measure(experts)

    def outputs() -> torch.Tensor:
        found = [flow.output(block, index).flatten(0, 1) for index in range(len(batches))]
        real = [(batch.segment_BT != PAD).flatten() for batch in batches]
        return torch.cat([each[own] for each, own in zip(found, real, strict=True)])

    return block, probe.compute_rises(experts), outputs
