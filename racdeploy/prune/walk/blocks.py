"""The decoder's blocks under torch, one at a time: load, run, and look at what reaches a linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from racdeploy.engines.backends.transformers.torch_model import (
    embed_positions,
    embedding_scale,
    fill_parameter,
    skeleton,
)
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors
from racdeploy.models.families import InputGroups, ends_part
from racdeploy.prune.device import CPU
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.beside import Beside
from racdeploy.prune.walk.own_inputs import OwnInputs
from racdeploy.prune.walk.routing import Routed
from racdeploy.prune.walk.streams import Streams


class Blocks:
    """A model on the meta device whose blocks are filled on demand; hidden states are float32."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        compute: Literal["float32", "bfloat16"] = "float32",  # of the products
        device: torch.device = CPU,
    ) -> None:
        self.checkpoint = checkpoint
        self.shape = checkpoint.shape
        self.device = device
        self._compute = compute
        self._model = skeleton(checkpoint)
        check_tensors(checkpoint, {name for name, _ in self._model.named_parameters()})

        self._own_inputs = OwnInputs(checkpoint) if OwnInputs.exist(checkpoint) else None
        self._streams = Streams(checkpoint) if checkpoint.family.streams else None

    def shapes(self, batches: Sequence[Batch]) -> list[tuple[int, ...]]:
        """Return (B, T, D) of each batch; D are those of all hidden states that a token has."""
        D = self.shape.state_width
        return [(*batch.ids_BT.shape, D) for batch in batches]

    def groups(self, block: Any) -> InputGroups:
        """Return the prunable linears of a block by the input they share."""
        number: int = block.number
        return self.shape.input_groups[number]

    def end_widths(self) -> dict[int, int]:
        """Return the inputs of each group that ends a part, in the block where it has most.

        Experts have no such group: each token has an input of its own for every expert it chose.
        """
        widths = dict[int, int]()

        for index, groups in enumerate(self.shape.input_groups):
            for group, (first, *_) in enumerate(groups):
                name = f"{self.prefix(index)}.{first}.weight"
                is_routed = first in self.shape.family.routed
                if ends_part(groups, group) and not is_routed:
                    _, I = self.checkpoint.entries[name].shape
                    widths[group] = max(I, widths.get(group, 0))

        return widths

    def embed(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """Yield what enters the first block, (B, T, D)."""
        if not batches:
            return

        # Only the rows of tokens that occur are read: the whole table may be larger than a block.
        used_N = torch.unique(torch.cat([batch.ids_BT.flatten() for batch in batches]))
        embedding = self.shape.family.embedding
        rows_ND = torch.from_numpy(self.checkpoint.read_rows(embedding, used_N.numpy()))
        rows_ND *= embedding_scale(self.shape)
        if self._streams:
            rows_ND = self._streams.begin(rows_ND)

        for batch in batches:
            yield rows_ND[torch.searchsorted(used_N, batch.ids_BT)]

    def prefix(self, index: int) -> str:
        return f"{self.shape.family.blocks}.{index}"

    def empty(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.prefix(index))

    def load(self, index: int) -> nn.Module:
        """Return a block with its weights in float32 on the device; ``.to("meta")`` frees them."""
        block = self.empty(index)
        for name, _ in list(block.named_parameters()):
            fill_parameter(self._model, f"{self.prefix(index)}.{name}", self.checkpoint)
            put(block, name, self.place(block.get_parameter(name).data))
        return block

    def last_norm(self) -> nn.Module:
        """Return the norm after the last block, and what comes before it, on the device."""
        name = self.shape.family.last_norm
        norm = self._model.get_submodule(name)
        fill_parameter(self._model, f"{name}.weight", self.checkpoint)
        put(norm, "weight", self.place(norm.get_parameter("weight").data))
        return self._streams.end(norm) if self._streams else norm

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)  # here and nowhere else; what a block returns stays there

    def forward(
        self,
        block: nn.Module,
        hidden_BTD: torch.Tensor,
        known: Mapping[int, torch.Tensor] | None = None,
        beside: Beside | None = None,
        *,
        to_end: bool = True,
    ) -> torch.Tensor:
        """Return a block's output at positions from zero, under a causal mask, on the device.

        ``known``: group → input of its one linear, found earlier; its part computes only that.
        ``beside``: of the batch, where a family needs it; ``to_end`` is False where a hook stops.
        """
        hidden_BTD = self.place(hidden_BTD)
        length = hidden_BTD.shape[1]
        position_1T = self.place(torch.arange(length))[None]
        given: dict[str, Any] = {"position_ids": position_1T}
        given["attention_mask"] = self._mask(block, length)
        given |= embed_positions(self._model, block, hidden_BTD, position_1T)
        if self._own_inputs:
            given |= self._give_beside(self._own_inputs, block, beside, to_end=to_end)

        with self.computing(), self._shortcuts(block, known or {}):
            output = block(self._streams.part(hidden_BTD) if self._streams else hidden_BTD, **given)

        result: torch.Tensor = output
        if isinstance(output, tuple):
            result = output[0]
        if self._streams:
            return self._streams.join(result)
        return result

    def computing(self) -> AbstractContextManager[Any]:
        """Return what products are made under, so that they are those of a forward pass."""
        if self._compute == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _give_beside(
        self, own_inputs: OwnInputs, block: Any, beside: Beside | None, *, to_end: bool
    ) -> dict[str, Any]:
        assert beside, "blocks of this family take more of a batch than its hidden states"
        given: dict[str, Any] = {"shared_kv_states": beside.keys}
        if to_end:  # which is where it comes in
            given["per_layer_input"] = own_inputs.of(block.number, beside.ids_BT, self.device)
        return given

    def _mask(self, block: Any, length: int) -> torch.Tensor | None:
        """Return which positions see which, (1, 1, T, T); None is sdpa's own causal mask."""
        config: Any = self._model.config
        window = getattr(config, "sliding_window", None)
        if block.attention_type != "sliding_attention" or not window or length <= window:
            return None

        position_T = self.place(torch.arange(length))
        distance_TT = position_T[:, None] - position_T
        seen_TT: torch.Tensor = (distance_TT >= 0) & (distance_TT < window)
        return seen_TT[None, None]

    @contextmanager
    def _shortcuts(self, block: Any, known: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """While the body runs, a part whose last input is known computes its last linear alone."""
        changed = []  # parts with another ``forward``: with hooks, their own would run anyway
        for group, input_BTI in known.items():
            (name,) = self.groups(block)[group]
            part_name = name.rpartition(".")[0]
            part = block.get_submodule(part_name)
            changed.append(part)

            attends = self.shape.attends[block.number] and part_name == self.shape.family.attention
            run_last = _run_attention if attends else _run_last
            part.forward = partial(run_last, block.get_submodule(name), self.place(input_BTI))

        try:
            yield
        finally:
            for part in changed:
                del part.forward  # the class's own shows through again

    def input(
        self,
        block: nn.Module,
        linear: str,
        hidden_BTD: torch.Tensor,
        known: Mapping[int, torch.Tensor] | None = None,
        beside: Beside | None = None,
    ) -> torch.Tensor:
        """Return what reaches one linear; nothing after it is computed."""
        (input_BTI, *_) = self._arguments(block, linear, hidden_BTD, known, beside)
        return input_BTI

    def routed(
        self,
        block: nn.Module,
        hidden_BTD: torch.Tensor,
        known: Mapping[int, torch.Tensor] | None = None,
        beside: Beside | None = None,
    ) -> Routed:
        """Return what reaches the experts of a block; none of them is computed."""
        experts = self.shape.family.experts
        return Routed(*self._arguments(block, experts, hidden_BTD, known, beside))

    def _arguments(
        self,
        block: nn.Module,
        name: str,
        hidden_BTD: torch.Tensor,
        known: Mapping[int, torch.Tensor] | None,
        beside: Beside | None,
    ) -> tuple[torch.Tensor, ...]:
        """Return what a module inside a block is called with, and stop there."""
        seen: list[tuple[torch.Tensor, ...]] = []

        def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs)
            raise _Reached

        hook = block.get_submodule(name).register_forward_pre_hook(stop)
        with hook, suppress(_Reached):
            self.forward(block, hidden_BTD, known, beside, to_end=False)

        return seen[0]


def _run_last(linear: nn.Module, input_BTI: torch.Tensor, *_: Any, **__: Any) -> Any:
    return linear(input_BTI)


def _run_attention(linear: nn.Module, input_BTI: torch.Tensor, *_: Any, **__: Any) -> Any:
    return linear(input_BTI), None  # sdpa gives no attention weights


class _Reached(Exception):
    """The forward pass got to the linear that was asked for."""


def put(block: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in place of the parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    block.get_submodule(owner).register_parameter(leaf, parameter)
