"""Write the tensors of a GGUF file: read, quantize, dequantize and count zeros by slabs of rows.

Memory holds one tensor as the checkpoint stores it, its packed rows if the checkpoint has these,
and two slabs a core.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from racdeploy import quant as quants
from racdeploy.exporting import ExportedTensor, WriteProgress
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.models.conversion import Order
from racdeploy.processes.cores import available_cores
from racdeploy.quant.grid import Bytes, Floats
from racdeploy.quant.importance import Importance
from racdeploy.tensors.safetensors import to_float32

ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes."""
_SLAB_WEIGHTS = 2_097_152  # 8 MiB of float32: many rows of a large model, and little memory a core
_MAX_WORKERS = 8  # beyond, the disk is the slower part
_QuantizedSlab = tuple[Bytes, int]
"""Packed rows, packed_OP, and their number of zeros."""


@dataclass(frozen=True)
class _Slab:
    """Some rows of a tensor: index of their part, their indices in it, and their values."""

    part: int
    rows: slice | Order
    weight_OI: Floats


@dataclass
class TensorWriter:
    """Writer of the tensors of a model, in one file or several, of ``total_bytes`` together."""

    importance: Importance | None
    total_bytes: int
    progress: WriteProgress | None
    _done_bytes: int = field(default=0, init=False)

    def append_tensors(self, file: Path, plan: Sequence[GgufTensorPlan]) -> list[ExportedTensor]:
        """Write tensors behind the header of a file; return them as they were written."""
        tensors = []
        with file.open("ab") as stream, ThreadPoolExecutor(_count_workers()) as pool:
            # The first end is that of the header.
            ends = iter_end_offsets(stream.tell(), plan)
            stream.write(bytes(next(ends) - stream.tell()))
            for tensor, end in zip(plan, ends, strict=True):
                zeros = self._write_tensor(stream, pool, tensor)
                stream.write(bytes(end - stream.tell()))
                tensors.append(
                    ExportedTensor(
                        name=tensor.name,
                        source=tensor.source,
                        shape=tensor.shape,
                        requested_quant=tensor.requested_quant,
                        actual_quant=tensor.actual_quant,
                        reason=tensor.reason,
                        zeros=zeros / max(1, math.prod(tensor.shape)),
                        size_bytes=tensor.size_bytes,
                    )
                )

            stream.flush()
            os.fsync(stream.fileno())

        return tensors

    def _write_tensor(
        self, stream: BinaryIO, pool: ThreadPoolExecutor, tensor: GgufTensorPlan
    ) -> int:
        """Write the packed rows of a tensor slab by slab; return its number of zeros."""
        quantizer = _SlabQuantizer(tensor, self.importance)
        zeros = 0
        for packed_OP, slab_zeros in _map_ahead(pool, quantizer.quantize, _iterate_slabs(tensor)):
            zeros += slab_zeros
            stream.write(packed_OP.data)
            self._done_bytes += packed_OP.nbytes
            if self.progress:
                self.progress(self._done_bytes, self.total_bytes)
        return zeros


class _SlabQuantizer:
    """Number format of one tensor, for worker threads."""

    def __init__(self, tensor: GgufTensorPlan, importance: Importance | None) -> None:
        self._tensor = tensor
        self._quant = quants.load_ggml(tensor.actual_quant)
        # What is in the file's format already goes into it unchanged.
        packed_parts = tensor.packed_parts
        index, count = tensor.row_split

        @lru_cache(maxsize=2)  # beside the next part
        def read_part(part: int) -> Bytes:
            return np.split(packed_parts[part].read_packed(), count)[index]

        self._is_packed = bool(packed_parts)
        self._read_part = read_part
        self._lock = Lock()  # workers that ask for a part at once wait for the one that reads it

        self._importances: list[Floats | None] = []  # of each part, columns as in the file
        if importance and tensor.uses_importance:
            for known_I in tensor.list_importances(importance):
                self._importances.append(tensor.conversion.reorder_columns(known_I))

    def quantize(self, slab: _Slab) -> _QuantizedSlab:
        """Return the packed rows of a slab, with their number of zeros."""
        tensor, weight_OI = self._tensor, slab.weight_OI
        packed_OP = self._pack(slab)

        # Zeros are counted in the dequantized rows, as an engine sees them.
        stored_OI = self._quant.dequantize(packed_OP, weight_OI.shape[1])
        quants.check_finite(
            tensor.source, tensor.actual_quant, weight_OI, stored_OI, wider="bf16 or f32"
        )
        return packed_OP, int(np.count_nonzero(stored_OI == 0))

    def _pack(self, slab: _Slab) -> Bytes:
        if self._is_packed:
            with self._lock:
                packed_OP: Bytes = self._read_part(slab.part)[slab.rows]
            return packed_OP

        known_I = self._importances[slab.part] if self._importances else None
        return np.ascontiguousarray(self._quant.quantize(slab.weight_OI, known_I))


def _iterate_slabs(tensor: GgufTensorPlan) -> Iterator[_Slab]:
    """Yield a tensor's values as llama.cpp expects them, in slabs of bounded size."""
    row_length = tensor.shape[-1]
    step = max(1, _SLAB_WEIGHTS // row_length)
    conversion = tensor.conversion
    missing = math.prod(tensor.shape[:-1])

    for part, raw in enumerate(tensor.read()):
        raw_OI = raw.reshape(-1, row_length)
        missing -= len(raw_OI)
        for start in range(0, len(raw_OI), step):
            rows = conversion.find_rows(slice(start, start + step))
            weight_OI = to_float32(raw_OI[rows])
            yield _Slab(part, rows, conversion.convert(weight_OI, rows))

    # Rows that the checkpoint lacks are zeros.
    for start in range(0, missing, step):
        rest = min(step, missing - start)
        yield _Slab(0, slice(0, 0), np.zeros((rest, row_length), np.float32))


def _map_ahead(
    pool: ThreadPoolExecutor,
    code: Callable[[_Slab], _QuantizedSlab],
    slabs: Iterator[_Slab],
) -> Iterator[_QuantizedSlab]:
    """Yield ``code`` of each slab in order; at most one slab a worker, and one more, is pending."""
    pending: deque[Future[_QuantizedSlab]] = deque()
    for slab in slabs:
        pending.append(pool.submit(code, slab))
        if len(pending) > _count_workers():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _count_workers() -> int:
    return min(available_cores(), _MAX_WORKERS)


def iter_end_offsets(header_bytes: int, plan: Iterable[GgufTensorPlan]) -> Iterator[int]:
    """Yield the end offsets of the header of a file and of each tensor, padding included."""
    offset = align_offset(header_bytes)
    yield offset
    for tensor in plan:
        offset = align_offset(offset + tensor.size_bytes)
        yield offset


def align_offset(offset: int) -> int:
    """Return an offset rounded up to a multiple of the alignment."""
    return offset + -offset % ALIGNMENT
