"""Files of finished blocks, those with a report; the first process has them and tells others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.prune.processes import Processes
from racdeploy.prune.walk.pruned_linear import PrunedLinear
from racdeploy.results.pruning import BlockRow, LinearRow

Kept = Mapping[str, list[int]]
"""Part that was cut → numbers of the units that stay."""


class BlockFiles:
    """What a walk over the blocks leaves in a folder."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder, self._processes = folder, processes

    def is_finished(self, index: int) -> bool:
        return self._processes.ask_first(self._report(index).is_file)

    def weights(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and float32 values of the tensors that pruning changed."""
        first = self._processes.first
        stored = load_file(self._weights(index)) if first else {}
        shapes = {name: tuple(value.shape) for name, value in stored.items()}
        for name, shape in self._processes.tell(shapes).items():
            value = stored[name].float() if first else torch.empty(shape)
            yield name, self._processes.spread(value)

    def rows(self, index: int) -> tuple[list[LinearRow], BlockRow]:
        found = self._read_report(index)
        linears = [LinearRow.model_validate(row) for row in found["linears"]]
        return linears, BlockRow.model_validate(found["block"])

    def kept(self, index: int) -> Kept:
        """Return which units of each part stay in a block; parts that are whole are not in it."""
        kept: Kept = self._read_report(index).get("kept", {})
        return kept

    def write_weights(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors of a block that pruning changed."""
        if self._processes.first:
            stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
            write_atomic(self._weights(index), save(stored))

    def write_importance(
        self, index: int, pruned: Mapping[str, PrunedLinear], kind: str = "importance"
    ) -> None:
        """Write the mean squared inputs of a block's linears, and on how many tokens they rest."""
        if not self._processes.first:
            return

        tensors: dict[str, torch.Tensor] = {}
        for name, linear in pruned.items():
            tensors[name] = linear.importance_I.cpu().clone()  # linears of a group share it
            tensors[f"{name}.tokens"] = torch.tensor([linear.tokens], dtype=torch.float64)

        write_atomic(self._folder / f"{kind}-{index:05d}.safetensors", save(tensors))

    def write_rows(self, index: int, linears: list[LinearRow], block: BlockRow, kept: Kept) -> None:
        if self._processes.first:
            rows = [row.model_dump() for row in linears]
            values = {"linears": rows, "block": block.model_dump(), "kept": kept}
            write_atomic(self._report(index), json.dumps(values, indent=1))

    def _read_report(self, index: int) -> Any:
        return self._processes.ask_first(lambda: read_json(self._report(index)))

    def _weights(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.safetensors"

    def _report(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.json"
