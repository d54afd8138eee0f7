"""Survey of the dense model before the walk: each linear with the Hessian of its input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from racdeploy.engines.backends.transformers.torch_model import set_parameter
from racdeploy.models.families import expand_experts, find_expert
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.block_inputs import BlockInputs
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.expert_linears import gather_groups
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.pair import BlockPair
from racdeploy.pruning.walk.relative_error import measure_relative_change
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import PAD

Effect = Callable[[Tensor], float]
"""Returns the relative change of the block's output if a linear gets other weights."""
Observation = Mapping[str, float]
Observe = Callable[[str, Tensor, Hessian, Effect], Observation]


def survey(
    session: PruningSession,
    wanted: Collection[str],
    observe: Observe,
) -> dict[str, Observation]:
    """Call ``observe`` for each of the named linears of the dense model.

    Effects are measured on one batch, the one with the most tokens, so that they
    compare across blocks and processes.

    Args:
        wanted: full names of the linears.
        observe: gets name, weights, Hessian and effect of a linear.

    Returns:
        Name → observation, from all processes.
    """
    # Nothing is pruned yet, so there are no other outputs to match.
    settings = session.settings.model_copy(update={"target": "linear_output"})
    session = replace(session, settings=settings)
    blocks = session.model
    probe = max(session.all_calibration_batches, key=lambda batch: batch.tokens)

    (probe_BTD,) = blocks.embed([probe])
    block_inputs = BlockInputs(probe.ids_BT)

    observations: dict[str, Observation] = {}

    with closing(
        CalibrationPass(blocks, session.calibration_batches, session.folder, "survey")
    ) as flow:
        fitted = range(len(session.calibration_batches))
        flow.embed(fitted)

        for index in range(blocks.shape.block_count):
            block = blocks.load_block(index)
            prefix = f"{blocks.prefix(index)}."
            linears = [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]
            groups = _list_wanted(session, index, linears)
            # The pass for the last input goes on to the end, unless experts are given theirs.
            last = max(groups, default=-1)
            advances = last >= 0 and find_expert(groups[last][0]) is None

            effects = _Effects(
                session, block, hidden_BTD=probe_BTD, batch=probe, block_inputs=block_inputs
            )

            for linear, weight_OI, hessian in _observe_block(
                session, flow, index, groups, advances=advances
            ):
                effect = partial(effects.measure, linear)
                observations[prefix + linear] = observe(prefix + linear, weight_OI, hessian, effect)

            if not advances:
                for batch in fitted:
                    flow.advance(block, batch)

            probe_BTD = effects.output_BTD  # of the unchanged block, not of a trial
            block.to("meta")
            session.report_progress("survey", index + 1)

    merged = session.share.merge(observations)
    return {name: merged[name] for name in wanted}


def _observe_block(
    session: PruningSession,
    flow: CalibrationPass,
    index: int,
    groups: Mapping[int, Sequence[str]],  # input group → its wanted linears
    *,
    advances: bool,  # with the last group, to the next block's input
) -> Iterator[tuple[str, Tensor, Hessian]]:
    """Yield name, weights and Hessian of the block's wanted linears that this process owns."""
    block = session.model.meta_block(index)
    checkpoint = session.model.checkpoint
    # Nothing is pruned yet: one block is both the dense and the sparse one.
    pair = BlockPair(
        checkpoint,
        dense_index=index,
        new_index=index,
        dense=block,
        sparse=block,
        dense_flow=flow,
        sparse_flow=flow,
    )

    for group, names in groups.items():
        full = {name: block.get_parameter(f"{name}.weight") for name in names}
        is_last = advances and group == max(groups)
        for pieces, statistics in gather_groups(session, pair, group, full, advances=is_last):
            for piece, statistic in zip(pieces, statistics, strict=True):
                share = session.share_linears(
                    {(name,): full[name].numel() for name in piece.linears}
                )
                statistic.reduce(share, piece.linears)
                owned = share.list_owned(piece.linears)
                if not owned:
                    continue

                hessian = statistic.hessian(session.settings.damping)
                for name in owned:
                    yield name, full[name] * ~hessian.dead_I, hessian


def _list_wanted(
    session: PruningSession, index: int, wanted: Sequence[str]
) -> dict[int, list[str]]:
    """Return input group → its wanted linears, without groups of none."""
    shape = session.model.shape
    found = {}
    for group, linears in enumerate(shape.input_groups[index]):
        names = [name for name in expand_experts(linears, shape.num_experts) if name in wanted]
        if names:
            found[group] = names
    return found


class _Effects:
    """Measures how a change of one linear changes the output of its block."""

    def __init__(
        self,
        session: PruningSession,
        block: nn.Module,
        hidden_BTD: Tensor,
        batch: Batch,
        block_inputs: BlockInputs,
    ) -> None:
        self._blocks = session.model
        self._block = block
        self._hidden_BTD = hidden_BTD
        self.output_BTD = self._blocks.forward(block, hidden_BTD, block_inputs=block_inputs)
        self._block_inputs = block_inputs.fork()
        self._real_BT = self._blocks.to_device(batch.segment_BT != PAD)

    def measure(self, linear: str, weight_OI: Tensor) -> float:
        """Return the mean over tokens of |change|² / |output|² with these weights in the linear."""
        parameter = f"{linear}.weight"
        dense_OI = self._block.get_parameter(parameter).data
        set_parameter(self._block, parameter, weight_OI)
        changed_BTD = self._blocks.forward(
            self._block, self._hidden_BTD, block_inputs=self._block_inputs
        )
        # Restored: later linears are measured in the dense block.
        set_parameter(self._block, parameter, dense_OI)

        return measure_relative_change(changed_BTD, self.output_BTD, self._real_BT)
