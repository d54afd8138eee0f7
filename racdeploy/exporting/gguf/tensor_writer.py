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

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.exporting import ExportedTensor, WriteProgress
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.multipliers import list_row_factors
from racdeploy.models.reordering import find_gguf_column_order, find_gguf_row_order
from racdeploy.processes.cores import available_cores
from racdeploy.quant.grid import Bytes, Floats
from racdeploy.quant.importance import Importance
from racdeploy.tensors.safetensors import to_float32

ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes."""
_SLAB_WEIGHTS = 2_097_152  # 8 MiB of float32: many rows of a large model, and little memory a core
_MAX_WORKERS = 8  # beyond, the disk is the slower part
_Slab = tuple[int, slice | NDArray[np.intp], Floats]
"""Part of the tensor, rows of that part, and their values."""
_QuantizedSlab = tuple[Bytes, int]


@dataclass
class TensorWriter:
    """Writer of the tensors of a model, in one file or several, of ``total_bytes`` together."""

    checkpoint: Checkpoint
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
                zeros = 0
                for packed_OP, slab_zeros in self._code(pool, tensor):
                    zeros += slab_zeros
                    stream.write(packed_OP.data)
                    self._done_bytes += packed_OP.nbytes
                    if self.progress:
                        self.progress(self._done_bytes, self.total_bytes)

                stream.write(bytes(end - stream.tell()))
                tensors.append(
                    ExportedTensor(
                        tensor.name,
                        tensor.source,
                        tensor.shape,
                        tensor.requested_quant,
                        tensor.actual_quant,
                        tensor.reason,
                        zeros / max(1, math.prod(tensor.shape)),
                        tensor.size_bytes,
                    )
                )

            stream.flush()
            os.fsync(stream.fileno())

        return tensors

    def _code(self, pool: ThreadPoolExecutor, tensor: GgufTensorPlan) -> Iterator[_QuantizedSlab]:
        """Yield the packed rows of a tensor slab by slab, in order, with their count of zeros."""
        quant = quants.load_ggml(tensor.actual_quant)
        known = (
            tensor.list_importances(self.importance)
            if self.importance and quant.uses_importance
            else [None]
        )
        order_I = find_gguf_column_order(tensor.transform, self.checkpoint.shape, tensor.shape[-1])
        if order_I is not None:
            known = [None if known_I is None else known_I[order_I] for known_I in known]

        # What is in the file's format already goes into it unchanged.
        index, count = tensor.row_split
        parts = tensor.find_packed_parts(self.checkpoint)

        lock = Lock()  # workers that ask for a part at once wait for the one that reads it

        @lru_cache(maxsize=2)  # beside the next part
        def read(part: int) -> Bytes:
            return np.split(parts[part].read_packed(), count)[index]

        # Runs in worker threads. Zeros are counted in the dequantized rows, as an engine sees them.
        def code(slab: _Slab) -> _QuantizedSlab:
            part, rows, weight_OI = slab
            if parts:
                with lock:
                    packed_OP = read(part)[rows]
            else:
                known_I = known[part] if len(known) > 1 else known[0]
                packed_OP = np.ascontiguousarray(quant.quantize(weight_OI, known_I))

            stored_OI = quant.dequantize(packed_OP, weight_OI.shape[1])
            quants.check_finite(
                tensor.source, tensor.actual_quant, weight_OI, stored_OI, wider="bf16 or f32"
            )
            return packed_OP, int(np.count_nonzero(stored_OI == 0))

        yield from _map_ahead(pool, code, _iterate_slabs(self.checkpoint, tensor, _SLAB_WEIGHTS))


def split_into_parts(plan: list[GgufTensorPlan], part_bytes: int) -> list[list[GgufTensorPlan]]:
    """Split tensors into runs of at most ``part_bytes``, or of one larger tensor; 0: one run."""
    parts: list[list[GgufTensorPlan]] = [[]]
    size_bytes = 0
    for tensor in plan:
        size_bytes += tensor.size_bytes
        if part_bytes and parts[-1] and size_bytes > part_bytes:
            parts.append([])
            size_bytes = tensor.size_bytes
        parts[-1].append(tensor)

    return parts


def _iterate_slabs(
    checkpoint: Checkpoint, tensor: GgufTensorPlan, slab_weights: int
) -> Iterator[_Slab]:
    """Yield a tensor's values as llama.cpp expects them, in slabs of about ``slab_weights``.

    Each slab comes with the index of its array among those of the tensor.
    """
    row_length = tensor.shape[-1]
    step = max(1, slab_weights // row_length)
    order_I = find_gguf_column_order(tensor.transform, checkpoint.shape, row_length)
    factors = list_row_factors(checkpoint.shape, tensor.name)
    missing = math.prod(tensor.shape[:-1])

    for part, raw in enumerate(tensor.read(checkpoint)):
        raw_OI = raw.reshape(-1, row_length)
        order_O = None
        missing -= len(raw_OI)
        if tensor.transform:
            order_O = find_gguf_row_order(tensor.transform, checkpoint.shape, len(raw))
            if raw.ndim == 1 and order_O is not None:  # a bias is one row
                raw_OI = raw_OI[:, order_O]
                order_O = None

        for start in range(0, len(raw_OI), step):
            chunk = slice(start, start + step)
            rows = chunk if order_O is None else order_O[chunk]
            weight_OI = to_float32(raw_OI[rows])
            if order_I is not None:
                weight_OI = weight_OI[:, order_I]
            if tensor.transform == "plus_one":
                weight_OI = weight_OI + np.float32(1)
            if tensor.transform == "decay":
                weight_OI = -np.exp(weight_OI)
            for factor_X1 in factors:
                weight_OI = weight_OI * (factor_X1[rows] if len(factor_X1) > 1 else factor_X1)
            yield part, rows, weight_OI

    # Rows that the checkpoint lacks are zeros.
    for start in range(0, missing, step):
        rest = min(step, missing - start)
        yield 0, slice(0, 0), np.zeros((rest, row_length), np.float32)


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
