"""Hidden states on the CPU between blocks: a window in memory, the rest in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from racdeploy.files.writing import disk_errors
from racdeploy.prune.bounds import WINDOW_BYTES


class Activations:
    """One float32 tensor for each shape; what the window does not hold is in ``file``.

    A smaller one may take its place: inputs of a narrower linear.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], file: Path, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._shapes = list(shapes)
        self._file = file
        self._room = [math.prod(shape) for shape in shapes]

        self._kept: dict[int, torch.Tensor] = {}
        self._offsets: dict[int, int] = {}
        used = spilled = 0

        for index, shape in enumerate(self._shapes):
            size = 4 * math.prod(shape)
            if used + size <= window_bytes:
                used += size
            else:
                self._offsets[index] = spilled
                spilled += size

    def __getitem__(self, index: int) -> torch.Tensor:
        if index not in self._offsets:
            return self._kept[index]

        shape = self._shapes[index]
        count = math.prod(shape)
        offset = self._offsets[index]
        values = np.fromfile(self._file, np.float32, count, offset=offset)
        return torch.from_numpy(values).view(shape)

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        room = self._room[index]
        assert hidden.numel() <= room, f"batch {index} has room for {room} values"
        self._shapes[index] = tuple(hidden.shape)
        hidden = hidden.cpu()

        if index not in self._offsets:
            self._kept[index] = hidden
            return

        with disk_errors(self._file):
            self._file.touch()
            with self._file.open("r+b", buffering=0) as stream:
                stream.seek(self._offsets[index])
                stream.write(hidden.contiguous().numpy().data)

    def close(self) -> None:
        """Give memory and disk back."""
        self._kept.clear()
        self._file.unlink(missing_ok=True)
