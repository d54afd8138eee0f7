"""A model of which one block at a time is in memory: load it, run it, capture a linear's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from racdeploy.engines.backends.transformers.torch_model import (
    build_skeleton,
    embedding_scale,
    fill_parameter,
    make_position_embeddings,
    set_parameter,
)
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import InputGroups, ends_part
from racdeploy.models.tensor_coverage import check_tensors
from racdeploy.pruning.device import CPU
from racdeploy.pruning.walk.altup import AltUp
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.block_inputs import BlockInputs
from racdeploy.pruning.walk.per_layer_inputs import compute_per_layer_input


class BlockwiseModel:
    """A model on the meta device whose blocks are loaded on demand; hidden states are float32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        compute: Literal["float32", "bfloat16"] = "float32",  # of matrix products
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint = checkpoint
        self.shape = checkpoint.shape
        self.device = device
        self._compute = compute
        self._model = build_skeleton(checkpoint)
        check_tensors(
            checkpoint, {name: value.shape for name, value in self._model.named_parameters()}
        )

        # Computed and in no file: who frees a block by moving it to meta would lose them.
        self._block_buffers = [
            dict(self.meta_block(index).named_buffers()) for index in range(self.shape.block_count)
        ]
        self._has_per_layer_inputs = "P" in checkpoint.family.sizes
        self._altup = AltUp(checkpoint) if checkpoint.family.altup else None

    def input_groups(self, block: Any) -> InputGroups:
        """Return the prunable linears of a block, grouped by the input they share."""
        number: int = block.number
        return self.shape.input_groups[number]

    def end_widths(self) -> dict[int, int]:
        """Return the input width of each group that ends attention or feed-forward.

        Of all blocks the widest counts. Experts are left out: a token has a different input for
        every expert that it is routed to.
        """
        widths = dict[int, int]()

        for index, groups in enumerate(self.shape.input_groups):
            for group, (first, *_) in enumerate(groups):
                name = f"{self.prefix(index)}.{first}.weight"
                is_routed = first in self.shape.family.expert_linears
                if ends_part(groups, group) and not is_routed:
                    _, I = self.checkpoint.entries[name].shape
                    widths[group] = max(I, widths.get(group, 0))

        return widths

    def embed(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Yield the hidden states before the first block, (B, T, D)."""
        if not batches:
            return

        # Only the rows of tokens that occur are read: the whole table may be larger than a block.
        used_N = torch.unique(torch.cat([batch.ids_BT.flatten() for batch in batches]))
        embedding = self.shape.family.embedding
        rows_ND = torch.from_numpy(self.checkpoint.read_rows(embedding, used_N.numpy()))
        rows_ND *= embedding_scale(self.shape)
        if self._altup:
            rows_ND = self._altup.expand(rows_ND)

        for batch in batches:
            yield rows_ND[torch.searchsorted(used_N, batch.ids_BT)]

    def prefix(self, index: int) -> str:
        return f"{self.shape.family.blocks}.{index}"

    def meta_block(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.prefix(index))

    def load_block(self, index: int) -> nn.Module:
        """Return a block with its weights in float32 on the device; ``.to("meta")`` frees them."""
        block = self.meta_block(index)
        for name, _ in list(block.named_parameters()):
            fill_parameter(self._model, f"{self.prefix(index)}.{name}", self.checkpoint)
            set_parameter(block, name, self.to_device(block.get_parameter(name).data))
        self.fill_buffers(block, index)
        return block

    def fill_buffers(self, block: nn.Module, index: int) -> None:
        """Give a block, or a copy of it, the constants of its modules, on the device."""
        for name, buffer in self._block_buffers[index].items():
            owner, _, leaf = name.rpartition(".")
            module = block.get_submodule(owner)
            module.register_buffer(leaf, self.to_device(buffer), persistent=False)

    def load_final_norm(self) -> Callable[[Tensor], Tensor]:
        """Load the norm after the last block, with AltUp's merge before it, to the device."""
        name = self.shape.family.modules.final_norm
        norm = self._model.get_submodule(name)
        fill_parameter(self._model, f"{name}.weight", self.checkpoint)
        set_parameter(norm, "weight", self.to_device(norm.get_parameter("weight").data))
        return partial(self._altup.merge, norm) if self._altup else norm

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)  # the only move to it; outputs of a block stay there

    def forward(
        self,
        block: Any,
        hidden_BTD: Tensor,
        cached_inputs: Mapping[int, Tensor] | None = None,
        block_inputs: BlockInputs | None = None,
        *,
        runs_to_end: bool = True,
    ) -> Tensor:
        """Return a block's output at positions from zero, under a causal mask, on the device.

        Args:
            block: a loaded block of this model.
            hidden_BTD: its input.
            cached_inputs: group → input of its linear, from an earlier pass. Attention or
                feed-forward then computes only that last linear.
            block_inputs: the batch's block inputs, for families that need them.
            runs_to_end: False where a hook stops the pass before its end.
        """
        hidden_BTD = self.to_device(hidden_BTD)
        length = hidden_BTD.shape[1]
        position_1T = self.to_device(torch.arange(length))[None]
        arguments: dict[str, Any] = {
            "position_ids": position_1T,
            "attention_mask": self._mask(block, length),
        }
        arguments |= make_position_embeddings(self._model, block, hidden_BTD, position_1T)
        if self._has_per_layer_inputs:
            assert block_inputs, "blocks of this family need token ids and shared keys too"
            arguments["shared_kv_states"] = block_inputs.shared_kv
            if runs_to_end:  # it is added after the linears at which a hook may stop
                arguments["per_layer_input"] = compute_per_layer_input(
                    self.checkpoint, block.number, block_inputs.ids_BT, self.device
                )

        if self._altup:
            hidden_BTD = self._altup.split(hidden_BTD)

        with self.autocast(), self._shortcuts(block, cached_inputs or {}):
            output = block(hidden_BTD, **arguments)

        result: Tensor = output[0] if isinstance(output, tuple) else output
        return self._altup.concatenate(result) if self._altup else result

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the forward pass, for products made outside of it."""
        if self._compute == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _mask(self, block: Any, length: int) -> Tensor | None:
        """Return the mask of a sliding window, (1, 1, T, T); None for sdpa's own causal mask."""
        config: Any = self._model.config
        window = getattr(config, "sliding_window", None)
        if block.attention_type != "sliding_attention" or not window or length <= window:
            return None

        position_T = self.to_device(torch.arange(length))
        distance_TT = position_T[:, None] - position_T
        seen_TT: Tensor = (distance_TT >= 0) & (distance_TT < window)
        return seen_TT[None, None]

    @contextmanager
    def _shortcuts(self, block: Any, cached_inputs: Mapping[int, Tensor]) -> Iterator[None]:
        """Within the context, modules with a cached last input compute only their last linear."""
        # Replace ``forward``: a hook could not keep the module's own computation from running.
        changed = []
        for group, input_BTI in cached_inputs.items():
            (name,) = self.input_groups(block)[group]
            owner = name.rpartition(".")[0]
            module = block.get_submodule(owner)
            changed.append(module)

            is_attention = owner == self.shape.family.modules.attention
            attends = self.shape.attends[block.number] and is_attention
            # Falcon-H1's feed-forward part multiplies its output.
            factor = getattr(module, "down_multiplier", 1.0)
            linear = block.get_submodule(name)
            module.forward = partial(
                _run_last, linear, self.to_device(input_BTI), factor=factor, attends=attends
            )

        try:
            yield
        finally:
            for module in changed:
                del module.forward  # uncovers the class's own

    def arguments_of(
        self,
        name: str,
        block: nn.Module,
        hidden_BTD: Tensor,
        cached_inputs: Mapping[int, Tensor] | None = None,
        block_inputs: BlockInputs | None = None,
    ) -> tuple[Tensor, ...]:
        """Run a block up to one of its modules; return the arguments that the module would get."""
        calls: list[tuple[Tensor, ...]] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls.append(inputs)
            raise _StopForward

        hook = block.get_submodule(name).register_forward_pre_hook(stop)
        with hook, suppress(_StopForward):
            self.forward(block, hidden_BTD, cached_inputs, block_inputs, runs_to_end=False)

        return calls[0]

    def arguments_and_output(
        self,
        name: str,
        block: nn.Module,
        hidden_BTD: Tensor,
        cached_inputs: Mapping[int, Tensor] | None = None,
        block_inputs: BlockInputs | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run a block to its end; return the arguments of one of its modules, and the output."""
        calls: list[tuple[Tensor, ...]] = []

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls.append(inputs)

        with block.get_submodule(name).register_forward_pre_hook(record):
            output_BTD = self.forward(block, hidden_BTD, cached_inputs, block_inputs)
        return calls[0], output_BTD


def _run_last(
    linear: nn.Module, input_BTI: Tensor, *_: Any, factor: float, attends: bool, **__: Any
) -> Any:
    output_BTO = linear(input_BTI) * factor
    return (output_BTO, None) if attends else output_BTO  # sdpa gives no attention weights


class _StopForward(Exception):
    """Ends a forward pass at the module whose input is recorded."""
