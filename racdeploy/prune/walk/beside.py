"""What blocks of some families take of a batch beside its hidden states.

Its token ids, of which every block may have an embedding of its own, and the keys and values that
an earlier block made. Those of a whole calibration are in files, like hidden states.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from racdeploy.models.shape import ModelShape
from racdeploy.prune.walk.activations import Activations
from racdeploy.prune.walk.batches import Batch

Keys = MutableMapping[str | int, tuple[torch.Tensor, torch.Tensor]]
"""Kind of attention, or number of the block that makes them → keys and values, (B, heads, T, K)."""


@dataclass(frozen=True)
class Beside:
    """What blocks take of a batch beside its hidden states, if they are passed in order.

    A block that makes keys for later ones writes them, so they are those of its last pass.
    """

    ids_BT: torch.Tensor
    keys: Keys = field(default_factory=dict)

    def apart(self) -> Beside:
        """Return the same for a trial, after which later blocks take what they would without."""
        return Beside(self.ids_BT, ChainMap({}, self.keys))


class Besides:
    """The same of all batches on their way through one model; keys and values are in files."""

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
        # By kind, and by number: transformers 5.8 asks Gemma 3n's for the block that made them.
        self._stored: dict[str | int, Activations] = {}

        for block, source in enumerate(shape.key_sources):
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

    def __getitem__(self, index: int) -> Beside:
        return Beside(self._ids[index], _StoredKeys(self._stored, index, self._device))

    def close(self) -> None:
        """Give the disk back."""
        for activations in self._stored.values():
            activations.close()


class _StoredKeys(MutableMapping[str | int, tuple[torch.Tensor, torch.Tensor]]):
    """Keys and values of one batch; those that no later block takes are not kept."""

    def __init__(
        self, stored: Mapping[str | int, Activations], index: int, device: torch.device
    ) -> None:
        self._stored, self._index, self._device = stored, index, device

    def __getitem__(self, kind: str | int) -> tuple[torch.Tensor, torch.Tensor]:
        key_BHTK, value_BHTK = self._stored[kind][self._index].to(self._device)
        return key_BHTK, value_BHTK

    def __setitem__(self, kind: str | int, made: tuple[torch.Tensor, torch.Tensor]) -> None:
        if kind in self._stored:
            self._stored[kind][self._index] = torch.stack(made).float()

    def __delitem__(self, kind: str | int) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
