"""Codes that pruning chose, in place of the weights of a model folder; the exporter packs them.

A weight is the tensors ``WEIGHT|QUANT|FIELD``, one for each field of :class:`GridCodes`, in the row
order of the model and the column order of the exported file. Step and minimum codes are signed
bytes. Of up to 16 values two codes lie in a byte: the first half of the row in the low bits. The
field ``weight_OI`` holds the weights themselves where the file orders columns in another way, or
multiplies rows, so that the codes do not give them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.quant import load, load_grid
from racdeploy.quant.grid import Bytes, Floats, Grid, GridCodes, pack_halves
from racdeploy.tensors.safetensors import (
    BYTE_DTYPE,
    PackedEntry,
    RowIndices,
    TensorEntry,
    WritableTensor,
    write_entries,
)

CODED_FILE = "coded-model.safetensors"
"""File of the tensors of a model with codes: under the usual name, transformers would draw weights
that it does not find at random."""
UNCODED_FILE = "uncoded-model.safetensors"
"""File of the tensors that lie in no file with codes: pruning leaves them the same, whatever the
number format."""


@dataclass(frozen=True)
class CodedWeight(PackedEntry):
    """A weight, read in float32, of which a file holds the codes: its parts, by field."""

    fields: Mapping[str, TensorEntry]

    def read(self) -> Floats:
        if "weight_OI" in self.fields:
            weight_OI: Floats = self.fields["weight_OI"].read()
            return weight_OI
        return load_grid(self.quant).decode(self.read_codes())

    def read_packed(self) -> Bytes:
        return load_grid(self.quant).pack(self.read_codes())

    def read_codes(self) -> GridCodes:
        """Return the codes of all rows."""
        code_OI = self.fields["code_OI"].read()
        if code_OI.shape != self.shape:  # two in a byte
            code_OI = np.concatenate([code_OI & 15, code_OI >> 4], axis=1)
        if code_OI.max(initial=0) >= len(load_grid(self.quant).values):
            raise _damage(f"{self.file} has codes that {self.quant} lacks")

        return GridCodes(
            code_OI=code_OI,
            scale_OX=self.fields["scale_OX"].read().astype(np.float32),
            step_code_OG=self._read_signed("step_code_OG"),
            minimum_code_OG=self._read_signed("minimum_code_OG"),
            minimum_scale_OX=self._read_minimum_scale(),
        )

    def _read_signed(self, field: str) -> NDArray[np.int16] | None:
        if field not in self.fields:
            return None
        stored_OG: Bytes = self.fields[field].read()
        return stored_OG.view(np.int8).astype(np.int16)

    def _read_minimum_scale(self) -> Floats | None:
        if "minimum_scale_OX" not in self.fields:
            return None
        stored_OX: NDArray[Any] = self.fields["minimum_scale_OX"].read()
        return stored_OX.astype(np.float32)


def name_arrays(
    weight: str, quant: str, codes: GridCodes, weight_OI: Floats
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a weight's codes by their names in the file."""
    grid = load_grid(quant)
    code_OP = pack_halves(codes.code_OI) if len(grid.values) <= 16 else codes.code_OI
    fields: dict[str, NDArray[Any]] = {"code_OI": code_OP, "scale_OX": _narrow(codes.scale_OX)}
    if codes.step_code_OG is not None:
        fields["step_code_OG"] = codes.step_code_OG.astype(np.int8).view(np.uint8)
    if codes.minimum_code_OG is not None:
        fields["minimum_code_OG"] = codes.minimum_code_OG.astype(np.int8).view(np.uint8)
    if codes.minimum_scale_OX is not None:
        fields["minimum_scale_OX"] = _narrow(codes.minimum_scale_OX)

    # Where the file orders columns in another way, codes do not give the weights.
    if not np.array_equal(grid.decode(codes), weight_OI):
        fields["weight_OI"] = weight_OI

    return {f"{weight}|{quant}|{name}": array for name, array in fields.items()}


def _narrow(scale_OX: NDArray[Any]) -> NDArray[Any]:
    """Return scales in half precision, or as they are if that would change one."""
    with np.errstate(over="ignore"):  # powers of two may be larger
        half_OX = scale_OX.astype(np.float16)
    return half_OX if np.array_equal(half_OX, scale_OX) else scale_OX


def join_codes(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return tensors by name, with one :class:`CodedWeight` for all fields of a weight."""
    coded: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        head, _, field = name.rpartition("|")
        coded.setdefault(head, {})[field] = entry

    weights = coded.pop("", {})
    for head, fields in coded.items():
        weight, _, quant = head.partition("|")
        weights[weight] = _join_fields(head, quant, fields)
    return dict(sorted(weights.items()))


def _join_fields(head: str, quant: str, fields: Mapping[str, TensorEntry]) -> CodedWeight:
    """Return the weight of these fields; refuse those that are no codes of the number format."""
    grid = load(quant).grid if quant in plugins.list_names("quant") else None
    code, scale = fields.get("code_OI"), fields.get("scale_OX")
    if grid is None or code is None or scale is None or len(scale.shape) != 2:
        raise _no_codes(head)

    O, X = scale.shape
    shape = (O, X * grid.block_size)
    expected = _list_field_shapes(grid, shape)
    if "weight_OI" in fields:
        expected["weight_OI"] = shape

    shapes = {name: part.shape for name, part in fields.items()}
    bytes_only = {name for name, part in fields.items() if part.dtype == BYTE_DTYPE}
    if shapes != expected or bytes_only != {name for name in fields if "code" in name}:
        raise _no_codes(head)

    return CodedWeight(
        file=code.file,
        start=code.start,
        stop=code.stop,
        dtype="F32",
        shape=shape,
        parts=tuple(fields.values()),
        packed_quant=quant,
        fields=fields,
    )


def _list_field_shapes(grid: Grid, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each field of a weight's codes, without ``weight_OI``."""
    O, I = shape
    scale_shape, group_shape = (O, I // grid.block_size), (O, I // grid.group_size)
    codes_per_byte = 2 if len(grid.values) <= 16 else 1

    shapes: dict[str, tuple[int, ...]] = {
        "code_OI": (O, I // codes_per_byte),
        "scale_OX": scale_shape,
    }
    if grid.step_codes:
        shapes["step_code_OG"] = group_shape
    if grid.minimum_codes:
        shapes["minimum_code_OG"] = group_shape
        shapes["minimum_scale_OX"] = scale_shape
    return shapes


def _no_codes(head: str) -> ModelError:
    return _damage(f"{head!r} are no codes of a number format")


def _damage(what: str) -> ModelError:
    return ModelError(
        "damaged-codes", f"the model is damaged: {what}", remedy="copy or build it again"
    )


def write_model(
    entries: Mapping[str, WritableTensor],
    folder: Path,
    rows: Mapping[str, RowIndices] | None = None,
    *,
    zero_filled: bool = False,
) -> None:
    """Write the tensors of a model into its folder as :func:`write_entries` does, codes as such."""
    coded = {entry.file for entry in entries.values() if isinstance(entry, CodedWeight)}
    other_file = UNCODED_FILE if coded else "model.safetensors"
    files: dict[str, dict[str, WritableTensor]] = {other_file: {}}
    for name, entry in entries.items():
        file = CODED_FILE if getattr(entry, "file", None) in coded else other_file
        tensors = files.setdefault(file, {})
        if isinstance(entry, CodedWeight):
            for field, part in entry.fields.items():
                tensors[f"{name}|{entry.quant}|{field}"] = part
        else:
            tensors[name] = entry

    for file, tensors in files.items():
        write_entries(tensors, folder / file, rows, zero_filled=zero_filled)


def rescale(codes: GridCodes, quant: str, weight_OI: Floats) -> GridCodes:
    """Return codes with the scales of weights whose scales alone were trained, in file order."""
    grid = load_grid(quant)

    def with_scales(scale_OX: Floats) -> GridCodes:
        minimum_scale_OX = codes.minimum_scale_OX
        if minimum_scale_OX is not None:  # that of zero
            minimum_scale_OX = scale_OX * np.float32(len(grid.values) // 2)
        return replace(codes, scale_OX=scale_OX, minimum_scale_OX=minimum_scale_OX)

    # Least squares give the scale of all weights of a block as exactly as half precision has it.
    unit_OI = grid.decode(with_scales(np.ones_like(codes.scale_OX)))
    unit_OXS = unit_OI.reshape(*codes.scale_OX.shape, grid.block_size)
    square_OX = np.square(unit_OXS).sum(axis=2)
    product_OX = (unit_OXS * weight_OI.reshape(unit_OXS.shape)).sum(axis=2)
    scale_OX = np.divide(product_OX, square_OX, out=codes.scale_OX.copy(), where=square_OX != 0)
    return with_scales(scale_OX.astype(np.float16).astype(np.float32))
