"""Hidden states on the CPU between blocks: a window in memory, the rest in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from racdeploy.files.writing import disk_errors
from racdeploy.pruning.memory_limits import WINDOW_BYTES


class Activations:
    """One float32 tensor for each batch; those that exceed the window are in ``file``.

    A smaller tensor may replace one, as the inputs of a linear that was cut.

    Args:
        shapes: maximum shape of the tensor at each index.
        window_bytes: bytes kept in memory, the first batches first.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], file: Path, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._shapes = list(shapes)
        self._file = file
        self._capacities = [math.prod(shape) for shape in shapes]

        self._in_memory: dict[int, Tensor] = {}
        self._offsets: dict[int, int] = {}
        used = spilled = 0

        for index, capacity in enumerate(self._capacities):
            size = 4 * capacity
            if used + size <= window_bytes:
                used += size
            else:
                self._offsets[index] = spilled
                spilled += size

    def __getitem__(self, index: int) -> Tensor:
        if index not in self._offsets:
            return self._in_memory[index]

        shape = self._shapes[index]
        offset = self._offsets[index]
        values = np.fromfile(self._file, np.float32, math.prod(shape), offset=offset)
        return torch.from_numpy(values).view(shape)

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        capacity = self._capacities[index]
        assert hidden.numel() <= capacity, f"batch {index} has room for {capacity} values"
        self._shapes[index] = tuple(hidden.shape)
        hidden = hidden.cpu()

        if index not in self._offsets:
            self._in_memory[index] = hidden
            return

        # Unbuffered and in place: each batch has its own range of the file, and is written whole.
        with disk_errors(self._file):
            self._file.touch()
            with self._file.open("r+b", buffering=0) as stream:
                stream.seek(self._offsets[index])
                stream.write(hidden.contiguous().numpy().data)

    def close(self) -> None:
        """Free the memory and delete the file."""
        self._in_memory.clear()
        self._file.unlink(missing_ok=True)
