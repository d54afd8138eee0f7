"""Write a checkpoint into the file format of an engine: one file per format.

A format file has ``export(checkpoint, out, *, quant, packing, metadata, …) -> ExportResult``. What could not
be stored as asked is in the result with a reason; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["ExportResult", "ExportedTensor", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes of the whole file."""


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of an exported file.

    Args:
        name: its name in the file.
        source: its name in the checkpoint's state_dict; empty where the exporter computed it.
        shape: as in the checkpoint, outputs first.
        quant_asked: the number format that was asked for.
        quant_real: the number format it has.
        reason: why the two differ, or empty.
        zeros: fraction of zeros in the file, 0 to 1, counted in the dequantized bytes.
        size_bytes: as stored, without padding.
        packing: how it is stored.
        packing_reason: why that is not the packing that was asked for, or empty.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    quant_asked: str
    quant_real: str
    reason: str
    zeros: float
    size_bytes: int
    packing: str = "plain"
    packing_reason: str = ""


@dataclass(frozen=True)
class ExportResult:
    """A finished file.

    Args:
        path: where it is.
        tensors: in file order.
        size_bytes: of the file.
        sha256: of the file.
        notes: what the engine will do differently from the checkpoint, in sentences.
        unpacked_sha256: of the file that a packed one stands for; empty where nothing is packed.
    """

    path: Path
    tensors: tuple[ExportedTensor, ...]
    size_bytes: int
    sha256: str
    notes: tuple[str, ...] = ()
    unpacked_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return everything but the folder as JSON values."""
        return {**asdict(replace(self, path=Path())), "path": self.path.name}

    @classmethod
    def from_json(cls, folder: Path, values: Mapping[str, Any]) -> ExportResult:
        """Read back what :meth:`to_json` returned, for a file in ``folder``."""
        tensors = tuple(ExportedTensor(**{**t, "shape": tuple(t["shape"])}) for t in values["tensors"])
        path = folder / values["path"]
        return cls(
            path,
            tensors,
            values["size_bytes"],
            values["sha256"],
            tuple(values["notes"]),
            values["unpacked_sha256"],
        )
