"""Whole blocks: one after the other, that whose removal changes the last hidden states least.

Every candidate is one hypothesis: what the later blocks make of the hidden states without it. All
go through the model together, block by block.
"""

from __future__ import annotations

from contextlib import closing

import torch

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.prune.structure.cut import Site
from racdeploy.prune.structure.layout import Layout, refuse_part, refuse_uncut
from racdeploy.prune.structure.units import Units
from racdeploy.prune.walk.activations import Activations
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.statistics import PAD
from racdeploy.recipe import Structure

STEP, SIZE = "model", "L"
PROBE_TOKENS = 2048


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return the blocks of the model."""
    return Layout(SIZE, shape.block_count, {SIZE: 1})


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    refuse_uncut("blocks", checkpoint.family)
    family = checkpoint.family
    if family.window_period or family.no_rope_period:
        why = "engines tell from a block's number how it attends, so cut ffn or heads instead"
        raise refuse_part("blocks", family, why)

    share = structure.share("blocks")
    shape = checkpoint.shape
    count = shape.block_count
    kept = round(share * count)
    least = max(1, len(_list_vital(shape)))
    if share < 1 and not least <= kept < count:
        raise UsageError(
            "share-not-reachable",
            f"blocks = {share:g} keeps {kept} of {count}",
            remedy=f"choose a share between {least / count:.3g} and {(count - 1) / count:.3g}",
        )


def cut(site: Site) -> list[int]:
    """Return the blocks that stay; the first process chooses them."""
    session = site.session
    return session.processes.ask_first(lambda: site.choose(BlockUnits(session)))


class BlockUnits(Units):
    """The blocks of a model, which have no size but what they change."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.blocks.shape.block_count)
        self._session = session
        self._dense_BTD: torch.Tensor | None = None

        # The first sequences of the batch with the most tokens that count.
        sizes = [int((batch.stream_BT != PAD).sum()) for batch in session.everyones]
        batch = session.everyones[sizes.index(max(sizes))]
        rows = max(1, PROBE_TOKENS // batch.ids_BT.shape[1])
        self._probe = Batch(
            ids_BT=batch.ids_BT[:rows],
            stream_BT=batch.stream_BT[:rows],
            task_B=batch.task_B[:rows],
            held_out=False,
        )

    def costs(self) -> torch.Tensor:
        """Return how far the last hidden states go from the dense ones without each block."""
        blocks = self._session.blocks
        left = self.kept
        (whole_BTD,) = blocks.embed([self._probe])
        shapes = [tuple(whole_BTD.shape)] * len(left)

        with closing(Activations(shapes, self._session.folder / "hypotheses.bin")) as without:
            for place, index in enumerate(left):
                block = blocks.load(index)
                for earlier in range(place):
                    without[earlier] = blocks.forward(block, without[earlier])

                without[place] = whole_BTD
                whole_BTD = blocks.forward(block, whole_BTD).cpu()

                block.to("meta")
                self._session.report("blocks", place + 1)

            if self._dense_BTD is None:
                self._dense_BTD = whole_BTD

            costs_U = torch.full_like(self.kept_U, torch.inf, dtype=torch.float64)
            for index in _list_removable(blocks.shape, left):
                costs_U[index] = self._relative_change(without[left.index(index)], self._dense_BTD)
            return costs_U

    sizes = costs

    def _relative_change(self, found_BTD: torch.Tensor, wanted_BTD: torch.Tensor) -> float:
        """Return the mean over tokens of |change|² / |wanted|²: norms divide by a token's size."""
        real_BT = self._probe.stream_BT != PAD
        change_N = (found_BTD[real_BT] - wanted_BTD[real_BT]).square().sum(-1)
        energy_N = wanted_BTD[real_BT].square().sum(-1)

        weight_N = self._session.weights_R.cpu()[self._probe.stream_BT[real_BT]]
        return float((change_N / energy_N) @ weight_N / weight_N.sum())


def _list_vital(shape: ModelShape) -> list[tuple[bool, ...]]:
    """Return which blocks do what at least one has to do: attend, and carry a state, or neither.

    llama.cpp keeps memory for both where a model may have both, and ends where one is empty.
    """
    roles = (shape.attends, shape.recurs)
    return [role for role in roles if any(role)] if shape.family.has_state else []


def _list_removable(shape: ModelShape, left: list[int]) -> list[int]:
    vital = set[int]()
    for role in _list_vital(shape):
        own = [block for block in left if role[block]]
        vital.update(own if len(own) == 1 else ())
    return [block for block in left if block not in vital]
