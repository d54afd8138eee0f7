"""Pass of the calibration batches through one model: hidden states, and inputs within a block.

The inputs of the linears that end attention and feed-forward are cached on disk: later passes
through the block start there, with the same results and about half the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from racdeploy.pruning.walk.activations import Activations
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.block_inputs import BatchBlockInputs, BlockInputs
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.routing import RoutedTokens

MAX_CACHED_INPUT_BYTES = 2 << 30
"""Maximum size of the cached inputs on disk; other batches compute theirs every time."""


class CalibrationPass:
    """Hidden states of the batches before the next block of one model, and cached inputs in it."""

    def __init__(
        self,
        blocks: BlockwiseModel,
        batches: Sequence[Batch],
        folder: Path,
        name: str,
    ) -> None:
        self._blocks, self._batches = blocks, batches
        D = blocks.shape.hidden_states_width
        shapes = [(*batch.ids_BT.shape, D) for batch in batches]
        self.hidden = Activations(shapes, folder / f"hidden-{name}.bin")
        self.block_inputs = BatchBlockInputs(
            blocks.shape, blocks.device, batches, folder=folder, name=name
        )

        widths = blocks.end_widths()
        cached = _choose_cached(batches, sum(widths.values()))

        self._inputs: dict[int, Activations] = {}

        for group, I in widths.items():
            file = folder / f"input-{name}-{group}.bin"
            shapes = [(*batch.ids_BT.shape, I) for batch in cached]
            self._inputs[group] = Activations(shapes, file, window_bytes=0)

        self._groups: list[set[int]] = [set() for _ in cached]  # cached in this block, by batch

    def embed(self, indices: Sequence[int]) -> None:
        """Store the embeddings of some batches as the input of the first block."""
        chosen = [self._batches[index] for index in indices]
        for index, hidden_BTD in zip(indices, self._blocks.embed(chosen), strict=True):
            self.hidden[index] = hidden_BTD

    def linear_input(
        self, block: nn.Module, group: int, index: int, *, is_final: bool = True
    ) -> Tensor:
        """Return the input of a group of linears.

        ``is_final``: weights before the group will not change, so that the input may be cached.
        """
        linear = self._blocks.input_groups(block)[group][0]
        (input_BTI, *_) = self._blocks.arguments_of(linear, block, *self._enter(index, group))

        if is_final and group in self._inputs and index < len(self._groups):
            self._inputs[group][index] = input_BTI.float()
            self._groups[index].add(group)

        return input_BTI

    def linear_input_and_advance(self, block: nn.Module, group: int, index: int) -> Tensor:
        """Return the input of a group of linears, and advance in the same pass.

        For a block that stays as it is; no other input in it can be asked for afterwards.
        """
        linear = self._blocks.input_groups(block)[group][0]
        (input_BTI, *_), output_BTD = self._blocks.arguments_and_output(
            linear, block, *self._enter(index, group)
        )
        self._store_output(index, output_BTD)
        return input_BTI

    def expert_input(self, block: nn.Module, index: int) -> RoutedTokens:
        """Return the tokens at the experts of a block, whose attention must be final."""
        experts = self._blocks.shape.family.experts_module
        return RoutedTokens(*self._blocks.arguments_of(experts, block, *self._enter(index)))

    def output(self, block: nn.Module, index: int) -> Tensor:
        """Return the block's output for a batch; its hidden states stay those before the block."""
        return self._blocks.forward(block, *self._enter(index))

    def advance(self, block: nn.Module, index: int) -> Tensor:
        """Return the block's output for a batch, and store it as the input of the next block."""
        output_BTD = self.output(block, index)
        self._store_output(index, output_BTD)
        return output_BTD

    def close(self) -> None:
        """Free the memory and delete the files."""
        self.block_inputs.close()
        for activations in (self.hidden, *self._inputs.values()):
            activations.close()

    def _store_output(self, index: int, output_BTD: Tensor) -> None:
        self.hidden[index] = output_BTD
        if index < len(self._groups):
            self._groups[index].clear()

    def _enter(
        self, index: int, before: float = math.inf
    ) -> tuple[Tensor, dict[int, Tensor], BlockInputs]:
        """Return what a batch enters the block with; cached inputs of groups ``before`` one."""
        groups = self._groups[index] if index < len(self._groups) else ()
        cached_inputs = {group: self._inputs[group][index] for group in groups if group < before}
        return self.hidden[index], cached_inputs, self.block_inputs[index]


def _choose_cached(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Return the first calibration batches whose inputs, ``width`` values a token, fit on disk."""
    cached = []
    size_bytes = 0

    for batch in batches:
        size_bytes += 4 * batch.ids_BT.numel() * width
        if batch.held_out or size_bytes > MAX_CACHED_INPUT_BYTES:
            break
        cached.append(batch)

    return cached
