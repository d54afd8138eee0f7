"""Look at every linear of the dense model once, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from racdeploy.prune.allocations import Effect, Observation
from racdeploy.prune.batches import Batch
from racdeploy.prune.blocks import Blocks, put
from racdeploy.prune.flow import Flow
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.processes import Processes
from racdeploy.prune.statistics import PAD, InputStatistic

Observe = Callable[[torch.Tensor, Hessian, Effect], Observation]


def survey(
    blocks: Blocks,
    batches: Sequence[Batch],
    everyones: Sequence[Batch],
    wanted: Collection[str],
    weights_S: torch.Tensor,
    damping: float,
    observe: Observe,
    folder: Path,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Observation]:
    """Return what ``observe`` says of each linear, by name: from its weights, its Hessian, and its effect.

    Args:
        blocks: of the dense model.
        batches: calibration batches of this process.
        everyones: those of all processes; effects are measured on the one that counts most, the same in each.
        wanted: names of the linears.
        weights_S: what a token of each stream counts, where the blocks are.
        damping: of the Hessians.
        observe: called for each linear, in forward order.
        folder: for scratch files.
        processes: who share the work.
        progress: called with a label, blocks done and blocks in all.
    """
    flow = Flow(blocks, batches, folder, "survey")
    found: dict[str, Observation] = {}
    names: list[str] = []
    probe = max(everyones, key=lambda batch: float(_weights_of(batch, weights_S).sum()))
    family, count = blocks.checkpoint.family, blocks.checkpoint.block_count
    try:
        for index, hidden_BTD in enumerate(blocks.embed(batches)):
            flow.hidden[index] = hidden_BTD
        (probe_BTD,) = blocks.embed([probe])
        for number in range(count):
            block = blocks.load(number)
            effects = _Effects(blocks, block, probe_BTD, weights_S, probe)
            for group, whole in enumerate(family.input_groups):
                linears = [
                    linear for linear in whole if f"{blocks.prefix(number)}.{linear}" in wanted
                ]
                if not linears:
                    continue
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
                        found[name] = observe(
                            weight_OI * ~hessian.dead_I, hessian, partial(effects.of, linear)
                        )
            for index in range(len(batches)):
                flow.leave(block, index)
            probe_BTD = effects.output_BTD
            block.to("meta")
            if progress:
                progress("survey", number + 1, count)
    finally:
        flow.close()
    merged = {name: seen for part in processes.all(found) for name, seen in part.items()}
    return {name: merged[name] for name in names}


class _Effects:
    """What a change of one linear does to the output of its block.

    Args:
        blocks: of the dense model.
        block: one of them, loaded.
        hidden_BTD: what enters it.
        weights_S: what a token of each stream counts.
        batch: whose tokens these are.
    """

    def __init__(
        self,
        blocks: Blocks,
        block: nn.Module,
        hidden_BTD: torch.Tensor,
        weights_S: torch.Tensor,
        batch: Batch,
    ) -> None:
        self._blocks, self._block, self._hidden_BTD = blocks, block, hidden_BTD
        self.output_BTD = blocks.forward(block, hidden_BTD)
        self._real_BT = blocks.place(batch.stream_BT != PAD)
        self._weight_N = _weights_of(batch, weights_S)

    def of(self, linear: str, weight_OI: torch.Tensor) -> float:
        """Return the mean over tokens of |change|² / |output|² at the block's end, with these weights in the linear."""
        parameter = f"{linear}.weight"
        dense_OI = self._block.get_parameter(parameter).data
        put(self._block, parameter, weight_OI)
        changed_BTD = self._blocks.forward(self._block, self._hidden_BTD)
        put(self._block, parameter, dense_OI)
        output_ND = self.output_BTD[self._real_BT]
        change_N = (changed_BTD[self._real_BT] - output_ND).square().sum(-1)
        share_N = torch.where(change_N > 0, change_N / output_ND.square().sum(-1), 0)
        return float(share_N @ self._weight_N / self._weight_N.sum())


def _weights_of(batch: Batch, weights_S: torch.Tensor) -> torch.Tensor:
    """Return what each token of a batch counts; padding is left out."""
    stream_N = batch.stream_BT[batch.stream_BT != PAD]
    return weights_S[stream_N.to(weights_S.device)]
