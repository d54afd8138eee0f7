"""A look at the dense model before the walk: every wanted linear with the Hessian of its input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import nn

from racdeploy.models.families import name_experts
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.beside import Beside
from racdeploy.prune.walk.blocks import put
from racdeploy.prune.walk.experts import ExpertGroup, count_tokens
from racdeploy.prune.walk.flow import Flow
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.walk.pair import BlockPair, gather_inputs
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import PAD, InputStatistic

Effect = Callable[[torch.Tensor], float]
"""Returns the change at the end of the block, with other weights in a linear."""
Observation = Mapping[str, float]
Observe = Callable[[str, torch.Tensor, Hessian, Effect], Observation]


def survey(
    session: Session,
    wanted: Collection[str],
    observe: Observe,
) -> dict[str, Observation]:
    """Return what ``observe`` makes of each linear of these names, which it is told.

    Blocks are compared on the batch that counts most, the same in each process.
    """
    blocks = session.blocks
    totals = [float(weigh_tokens(session, batch).sum()) for batch in session.everyones]
    probe = session.everyones[totals.index(max(totals))]

    (probe_BTD,) = blocks.embed([probe])
    beside = Beside(probe.ids_BT)

    found: dict[str, Observation] = {}

    with closing(Flow(blocks, session.fitted, session.folder, "survey")) as flow:
        fitted = range(len(session.fitted))
        flow.enter(fitted)

        for index in range(blocks.shape.block_count):
            block = blocks.load(index)
            prefix = f"{blocks.prefix(index)}."
            own = [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]

            effects = _Effects(session, block, probe_BTD, probe, beside)

            for linear, weight_OI, hessian in _observe_block(session, flow, index, own):
                effect = partial(effects.measure, linear)
                found[prefix + linear] = observe(prefix + linear, weight_OI, hessian, effect)

            for place in fitted:
                flow.leave(block, place)

            probe_BTD = effects.output_BTD
            block.to("meta")
            session.report("survey", index + 1)

    everyones: dict[str, Observation] = {}
    for part in session.processes.all(found):
        everyones |= part

    return {name: everyones[name] for name in wanted}


def _observe_block(
    session: Session, flow: Flow, index: int, wanted: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor, Hessian]]:
    """Yield those of a block's wanted linears that this process owns: name, weights, Hessian."""
    block = session.blocks.empty(index)
    checkpoint = session.blocks.checkpoint
    experts = checkpoint.shape.num_experts
    pair = BlockPair(
        checkpoint=checkpoint,
        index=index,
        place=index,
        dense=block,
        sparse=block,
        dense_flow=flow,
        sparse_flow=flow,
    )

    for group, linears in enumerate(pair.input_groups):
        names = [linear for linear in name_experts(linears, experts) if linear in wanted]
        full = {name: block.get_parameter(f"{name}.weight") for name in names}
        if not names:
            continue

        if linears[0] not in checkpoint.family.routed:
            statistic = gather_inputs(session, pair, group, [*full.values()], match=False)
            yield from _observe_owned(session, full, names, statistic)
            continue

        if not pair.tokens:
            pair.tokens = count_tokens(session, flow, block, experts)

        members = ExpertGroup(session, pair, names, match=False)
        for part in members.split(members.pieces(), full):
            for piece, statistic in zip(part, members.gather(part, full), strict=True):
                yield from _observe_owned(session, full, piece.linears, statistic)


def _observe_owned(
    session: Session,
    full: Mapping[str, torch.Tensor],
    names: Sequence[str],
    statistic: InputStatistic,
) -> Iterator[tuple[str, torch.Tensor, Hessian]]:
    processes = session.processes
    weights = [full[name] for name in names]
    owners = processes.owners([weight_OI.numel() for weight_OI in weights])
    statistic.share(processes, owners)
    if processes.rank not in owners:
        return

    hessian = statistic.hessian(session.settings.damping)

    for name, weight_OI, owner in zip(names, weights, owners, strict=True):
        if owner == processes.rank:
            yield name, weight_OI * ~hessian.dead_I, hessian


class _Effects:
    """What a change of one linear does to the output of its block."""

    def __init__(
        self,
        session: Session,
        block: nn.Module,
        hidden_BTD: torch.Tensor,
        batch: Batch,
        beside: Beside,
    ) -> None:
        self._blocks, self._block, self._hidden_BTD = session.blocks, block, hidden_BTD
        self.output_BTD = self._blocks.forward(block, hidden_BTD, beside=beside)
        self._beside = beside.apart()
        self._real_BT = self._blocks.place(batch.stream_BT != PAD)
        self._weight_N = weigh_tokens(session, batch)

    def measure(self, linear: str, weight_OI: torch.Tensor) -> float:
        """Return the mean over tokens of |change|² / |output|² with these weights in the linear."""
        parameter = f"{linear}.weight"
        dense_OI = self._block.get_parameter(parameter).data
        put(self._block, parameter, weight_OI)
        changed_BTD = self._blocks.forward(self._block, self._hidden_BTD, beside=self._beside)
        put(self._block, parameter, dense_OI)

        output_ND = self.output_BTD[self._real_BT]
        change_ND = changed_BTD[self._real_BT] - output_ND
        change_N = change_ND.square().sum(-1)
        energy_N = output_ND.square().sum(-1)

        weight_N = self._weight_N
        share_N = torch.where(change_N > 0, change_N / energy_N, 0)
        return float(share_N @ weight_N / weight_N.sum())


def weigh_tokens(session: Session, batch: Batch) -> torch.Tensor:
    """Return what each token of a batch counts; padding is left out."""
    stream_N = batch.stream_BT[batch.stream_BT != PAD]
    return session.weights_R[stream_N.to(session.weights_R.device)]
