"""Inputs of a block other than the hidden states, for families that have some.

These are the token ids, which per-layer embeddings need, and keys and values that an earlier block
computed. Keys and values of a whole calibration are in files, like hidden states.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from racdeploy.models.shape import ModelShape
from racdeploy.pruning.walk.activations import Activations
from racdeploy.pruning.walk.batches import Batch

SharedKeysValues = MutableMapping[str | int, tuple[Tensor, Tensor]]
"""Kind of attention, or index of the block they come from → keys and values, (B, heads, T, K)."""


@dataclass(frozen=True)
class BlockInputs:
    """Token ids and shared keys and values of one batch; blocks must run in order.

    A block that computes keys for later blocks writes them, so the last forward pass wins.
    """

    ids_BT: Tensor
    shared_kv: SharedKeysValues = field(default_factory=dict)

    def fork(self) -> BlockInputs:
        """Return a copy for a trial pass, whose keys and values the original does not see."""
        return BlockInputs(self.ids_BT, ChainMap({}, self.shared_kv))


class BatchBlockInputs:
    """Block inputs of all batches for one model; keys and values are in files."""

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        batches: Sequence[Batch],
        folder: Path,
        name: str,
    ) -> None:
        self._ids = [batch.ids_BT for batch in batches]
        self._device = device
        # By kind and by block: transformers 5.8 looks Gemma 3n's up by the block they come from.
        self._stored: dict[str | int, Activations] = {}

        for block, source in enumerate(shape.kv_sources):
            kind = shape.layer_types[block]
            if source == block or kind in self._stored:
                continue

            heads = shape.widths["num_key_value_heads"][source]
            size = shape.sizes[source]["K"]
            shapes = []
            for ids_BT in self._ids:
                B, T = ids_BT.shape
                shapes.append((2, B, heads, T, size))

            file = folder / f"keys-{name}-{kind}.bin"
            self._stored[kind] = self._stored[source] = Activations(shapes, file, window_bytes=0)

    def __getitem__(self, index: int) -> BlockInputs:
        return BlockInputs(self._ids[index], _StoredKeys(self._stored, index, self._device))

    def close(self) -> None:
        """Delete the files."""
        for activations in self._stored.values():
            activations.close()


class _StoredKeys(MutableMapping[str | int, tuple[Tensor, Tensor]]):
    """Keys and values of one batch; those that no later block uses are dropped."""

    def __init__(
        self, stored: Mapping[str | int, Activations], index: int, device: torch.device
    ) -> None:
        self._stored, self._index, self._device = stored, index, device

    def __getitem__(self, kind: str | int) -> tuple[Tensor, Tensor]:
        key_BHTK, value_BHTK = self._stored[kind][self._index].to(self._device)
        return key_BHTK, value_BHTK

    def __setitem__(self, kind: str | int, keys_values: tuple[Tensor, Tensor]) -> None:
        if kind in self._stored:
            self._stored[kind][self._index] = torch.stack(keys_values).float()

    def __delitem__(self, kind: str | int) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
