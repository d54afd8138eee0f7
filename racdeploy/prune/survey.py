"""Look at every linear of the dense model once, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from racdeploy.prune.allocations import Observation
from racdeploy.prune.batches import Batch
from racdeploy.prune.blocks import Blocks
from racdeploy.prune.flow import Flow
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.processes import Processes
from racdeploy.prune.statistics import InputStatistic

__all__ = ["survey"]

Observe = Callable[[torch.Tensor, Hessian], Observation]


def survey(
    blocks: Blocks,
    batches: Sequence[Batch],
    weights_S: torch.Tensor,
    damping: float,
    observe: Observe,
    folder: Path,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Observation]:
    """Return what ``observe`` says of each linear's weights and Hessian, by name.

    Args:
        blocks: of the dense model.
        batches: calibration batches.
        weights_S: what a token of each stream counts, where the blocks are.
        damping: of the Hessians.
        observe: called for each linear, in forward order.
        folder: for scratch files.
        processes: who share the work; ``batches`` are this one's.
        progress: called with a label, blocks done and blocks in all.
    """
    flow = Flow(blocks, batches, folder, "survey")
    found: dict[str, Observation] = {}
    names: list[str] = []
    family, count = blocks.checkpoint.family, blocks.checkpoint.block_count
    try:
        for index, hidden_BTD in enumerate(blocks.embed(batches)):
            flow.hidden[index] = hidden_BTD
        for number in range(count):
            block = blocks.load(number)
            for group, linears in enumerate(family.input_groups):
                dense = [block.get_parameter(f"{linear}.weight") for linear in linears]
                statistic = InputStatistic(dense[0].shape[1], weights_S)
                for index, batch in enumerate(batches):
                    statistic.add(flow.input(block, group, index), None, batch.stream_BT)
                owners = processes.owners([weight_OI.numel() for weight_OI in dense])
                statistic.share(processes, owners)
                hessian = statistic.hessian(damping) if processes.rank in owners else None
                for linear, weight_OI, owner in zip(linears, dense, owners, strict=True):
                    name = f"{blocks.prefix(number)}.{linear}"
                    names.append(name)
                    if hessian and owner == processes.rank:
                        found[name] = observe(weight_OI * ~hessian.dead_I, hessian)
            for index in range(len(batches)):
                flow.leave(block, index)
            block.to("meta")
            if progress:
                progress("survey", number + 1, count)
    finally:
        flow.close()
    merged = {name: seen for part in processes.all(found) for name, seen in part.items()}
    return {name: merged[name] for name in names}
