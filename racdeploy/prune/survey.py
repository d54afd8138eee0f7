"""Look at every linear of the dense model once, before anything is pruned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from functools import partial

import torch
from torch import nn

from racdeploy.prune.allocations import Effect, Observation
from racdeploy.prune.batches import Batch
from racdeploy.prune.blocks import Blocks, put
from racdeploy.prune.flow import Flow
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.session import Session
from racdeploy.prune.statistics import PAD, InputStatistic

Observe = Callable[[torch.Tensor, Hessian, Effect], Observation]


def survey(session: Session, wanted: Collection[str], observe: Observe) -> dict[str, Observation]:
    """Return what ``observe`` makes of each linear, from its weights, its Hessian and its effect.

    Effects are measured on the one batch that counts most, the same in each process.

    Args:
        session: the model and the batches.
        wanted: names of the linears.
        observe: called for each linear, in forward order.
    """
    blocks, batches, weights_R = session.blocks, session.fitted, session.weights_R
    probe = max(session.everyones, key=lambda batch: float(_weigh_tokens(batch, weights_R).sum()))
    (probe_BTD,) = blocks.embed([probe])

    order: list[str] = []
    found: dict[str, Observation] = {}
    with closing(Flow(blocks, batches, session.folder, "survey")) as flow:
        for place, hidden_BTD in enumerate(blocks.embed(batches)):
            flow.hidden[place] = hidden_BTD

        for index in range(blocks.checkpoint.block_count):
            block = blocks.load(index)
            effects = _Effects(blocks, block, probe_BTD, weights_R, probe)
            for group, linears in enumerate(blocks.checkpoint.family.input_groups):
                names = {f"{blocks.prefix(index)}.{linear}": linear for linear in linears}
                names = {name: linear for name, linear in names.items() if name in wanted}
                if not names:
                    continue

                order += names
                statistic = InputStatistic(blocks.widths()[group], weights_R)
                for place, batch in enumerate(batches):
                    statistic.add(flow.input(block, group, place), None, batch.stream_BT)
                found |= _observe_own(session, block, names, statistic, observe, effects)

            for place in range(len(batches)):
                flow.leave(block, place)
            probe_BTD = effects.output_BTD
            block.to("meta")
            session.report("survey", index + 1)

    everything: dict[str, Observation] = {}
    for part in session.processes.all(found):
        everything |= part
    return {name: everything[name] for name in order}


def _observe_own(
    session: Session,
    block: nn.Module,
    names: Mapping[str, str],
    statistic: InputStatistic,
    observe: Observe,
    effects: _Effects,
) -> dict[str, Observation]:
    """Observe those of a group's linears, name → place in the block, that this process owns."""
    processes = session.processes
    weights = [block.get_parameter(f"{linear}.weight") for linear in names.values()]
    owners = processes.owners([weight_OI.numel() for weight_OI in weights])
    statistic.share(processes, owners)
    if processes.rank not in owners:
        return {}

    hessian = statistic.hessian(session.settings.damping)
    found = {}
    for (name, linear), weight_OI, owner in zip(names.items(), weights, owners, strict=True):
        if owner == processes.rank:
            live_OI = weight_OI * ~hessian.dead_I
            found[name] = observe(live_OI, hessian, partial(effects.measure, linear))

    return found


class _Effects:
    """What a change of one linear does to the output of its block."""

    def __init__(
        self,
        blocks: Blocks,
        block: nn.Module,
        hidden_BTD: torch.Tensor,
        weights_R: torch.Tensor,
        batch: Batch,
    ) -> None:
        self._blocks, self._block, self._hidden_BTD = blocks, block, hidden_BTD
        self.output_BTD = blocks.forward(block, hidden_BTD)
        self._real_BT = blocks.place(batch.stream_BT != PAD)
        self._weight_N = _weigh_tokens(batch, weights_R)

    def measure(self, linear: str, weight_OI: torch.Tensor) -> float:
        """Return the mean over tokens of |change|² / |output|² with these weights in the linear."""
        parameter = f"{linear}.weight"
        dense_OI = self._block.get_parameter(parameter).data
        put(self._block, parameter, weight_OI)
        changed_BTD = self._blocks.forward(self._block, self._hidden_BTD)
        put(self._block, parameter, dense_OI)

        output_ND = self.output_BTD[self._real_BT]
        change_N = (changed_BTD[self._real_BT] - output_ND).square().sum(-1)
        share_N = torch.where(change_N > 0, change_N / output_ND.square().sum(-1), 0)
        return float(share_N @ self._weight_N / self._weight_N.sum())


def _weigh_tokens(batch: Batch, weights_R: torch.Tensor) -> torch.Tensor:
    """Return what each token of a batch counts; padding is left out."""
    stream_N = batch.stream_BT[batch.stream_BT != PAD]
    return weights_R[stream_N.to(weights_R.device)]
