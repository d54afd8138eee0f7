"""Files of finished blocks: weights, importance and a report each.

One process reads and writes them, and the others get their contents. A block is finished once its
report is there, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.pruning.walk.pruned_linear import PrunedLinear
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.quant.stored_codes import join_codes, name_arrays
from racdeploy.results.pruning import BlockRow, LinearRow
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries, to_float32

KeptUnits = Mapping[str, list[int]]
"""Structure that was cut → indices of the units that stay."""


@dataclass(frozen=True)
class BlockFiles:
    """Reads and writes the files of a pruning in its folder."""

    session: PruningSession

    def is_finished(self, index: int) -> bool:
        return self.session.share.run_once(self._report(index).is_file)

    def read_weights(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield name and float32 value of each tensor that pruning changed, in all processes."""
        stored: dict[str, TensorEntry] = {}
        if self.session.share.has_files:
            stored = join_codes(read_tensor_entries(self._weights(index)))

        shapes = self.session.share.run_once(
            lambda: {name: entry.shape for name, entry in stored.items()}
        )
        for name, shape in shapes.items():
            value = torch.empty(shape)
            if self.session.share.has_files:
                value = torch.from_numpy(to_float32(stored[name].read()))
            yield name, self.session.share.send_to_all(value)

    def read_rows(self, index: int) -> tuple[list[LinearRow], BlockRow, KeptUnits]:
        """Return the rows of a block, and the units of each structure that was cut that stay."""
        report = self.session.share.run_once(lambda: read_json(self._report(index)))
        linears = [LinearRow.model_validate(row) for row in report["linears"]]
        return linears, BlockRow.model_validate(report["block"]), report["kept"]

    def write_weights(
        self, index: int, cut: Mapping[str, Tensor], pruned: Mapping[str, PrunedLinear]
    ) -> None:
        """Write the tensors of a block that a cut or pruning changed; codes where it chose some."""
        if not self.session.share.has_files:
            return

        tensors = {**cut, **{name: linear.stored_OI for name, linear in pruned.items()}}
        for name, linear in pruned.items():
            if linear.codes:
                weight_OI = tensors.pop(name).cpu().numpy()
                arrays = name_arrays(name, linear.quant, linear.codes, weight_OI)
                tensors |= {each: torch.tensor(values) for each, values in arrays.items()}

        stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_atomic(self._weights(index), save(stored))

    def write_importance(
        self, index: int, pruned: Mapping[str, PrunedLinear], kind: str = "importance"
    ) -> None:
        """Write the mean squared inputs of a block's linears, and the tokens that each averages."""
        if not self.session.share.has_files:
            return

        tensors: dict[str, Tensor] = {}
        for name, linear in pruned.items():
            # A copy each: linears of a group share one tensor, which safetensors refuses.
            tensors[name] = linear.importance_I.cpu().clone()
            tensors[f"{name}.tokens"] = torch.tensor([linear.tokens], dtype=torch.float64)

        write_atomic(self.session.folder / f"{kind}-{index:05d}.safetensors", save(tensors))

    def write_rows(
        self, index: int, linears: list[LinearRow], block: BlockRow, kept: KeptUnits
    ) -> None:
        if self.session.share.has_files:
            rows = [row.model_dump() for row in linears]
            values = {"linears": rows, "block": block.model_dump(), "kept": kept}
            write_atomic(self._report(index), json.dumps(values, indent=1))

    def _weights(self, index: int) -> Path:
        return self.session.folder / f"block-{index:05d}.safetensors"

    def _report(self, index: int) -> Path:
        return self.session.folder / f"block-{index:05d}.json"
