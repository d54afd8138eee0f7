"""Removal of whole blocks: each time the one that changes the last hidden states least.

For every candidate the hidden states of a model without it are computed. All candidates pass
through the model together, so that each block is loaded once a round.
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.cut import CutContext
from racdeploy.pruning.structure.layout import UnitLayout, check_cuttable, part_error
from racdeploy.pruning.structure.prunable_units import PrunableUnits
from racdeploy.pruning.walk.activations import Activations
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.relative_error import measure_relative_change
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.statistics import PAD
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "model", "L"
TEXT_KL = {0.9: 1.3}
PROBE_TOKENS = 2048


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the blocks of the model."""
    return UnitLayout(SIZE_LETTER, shape.block_count, {SIZE_LETTER: 1})


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse an impossible cut with a UsageError."""
    check_cuttable("blocks", checkpoint.family)
    family = checkpoint.family
    if family.window.period or family.rope.unrotated_period:
        reason = (
            "engines choose a block's kind of attention by its number; cut ffn or heads instead"
        )
        raise part_error("blocks", family, reason)

    share = structure.kept_share("blocks")
    shape = checkpoint.shape
    count = shape.block_count
    kept = round(share * count)
    min_count = max(1, len(_list_roles(shape)))
    if share < 1 and not min_count <= kept < count:
        raise UsageError(
            "share-not-reachable",
            f"blocks = {share:g} keeps {kept} of {count}",
            remedy=f"choose a share between {min_count / count:.3g} and {(count - 1) / count:.3g}",
        )


def cut(context: CutContext) -> list[int]:
    """Return the blocks that stay; one process chooses them for all."""
    session = context.session
    return session.share.run_once(lambda: context.choose(BlockUnits(session)))


class BlockUnits(PrunableUnits):
    """Blocks of a model as units; their size is the change by their removal, too."""

    def __init__(self, session: PruningSession) -> None:
        super().__init__(session.model.shape.block_count)
        self._session = session
        self._dense_BTD: Tensor | None = None

        # The first sequences of the batch with the most real tokens.
        batch = max(session.all_calibration_batches, key=lambda batch: batch.tokens)
        rows = max(1, PROBE_TOKENS // batch.ids_BT.shape[1])
        self._probe = Batch(
            batch.ids_BT[:rows], batch.segment_BT[:rows], batch.task_B[:rows], held_out=False
        )

    def costs(self) -> Tensor:
        """Return the relative change of the last hidden states by removing each block."""
        blocks = self._session.model
        kept = self.kept
        (whole_BTD,) = blocks.embed([self._probe])
        shapes = [tuple(whole_BTD.shape)] * len(kept)

        with closing(Activations(shapes, self._session.folder / "hypotheses.bin")) as without:
            for position, index in enumerate(kept):
                block = blocks.load_block(index)
                for earlier in range(position):
                    without[earlier] = blocks.forward(block, without[earlier])

                # The model without this block leaves it out: its state is the block's input.
                without[position] = whole_BTD
                whole_BTD = blocks.forward(block, whole_BTD).cpu()

                block.to("meta")
                self._session.report_progress("blocks", position + 1)

            if self._dense_BTD is None:
                self._dense_BTD = whole_BTD

            costs_U = torch.full_like(self.kept_U, torch.inf, dtype=torch.float64)

            # The last blocks of their role stay.
            vital = set[int]()
            for role in _list_roles(blocks.shape):
                holders = [block for block in kept if role[block]]
                vital.update(holders if len(holders) == 1 else ())

            for position, index in enumerate(kept):
                if index not in vital:
                    costs_U[index] = measure_relative_change(
                        without[position], self._dense_BTD, self._probe.segment_BT != PAD
                    )

            return costs_U

    sizes = costs


def _list_roles(shape: ModelShape) -> list[tuple[bool, ...]]:
    """Return, for each role that some block must keep, whether each block has it.

    The roles are attention and a recurrent state, in families that have both: llama.cpp allocates
    memory for both and aborts if one is empty. Where every block has both, there is one role.
    """
    roles = {shape.attends, shape.recurs}
    return [role for role in roles if any(role)] if shape.family.has_state else []
