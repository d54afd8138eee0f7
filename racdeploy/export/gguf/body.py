"""Write the tensors of a GGUF file: read, quantized, read back and counted in slabs of rows.

In memory are one tensor as the checkpoint stores it, and two slabs a core.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.export import ExportedTensor, Progress
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.reordering import order_columns, order_rows
from racdeploy.processes.cores import available_cores
from racdeploy.quant.importance import Importance
from racdeploy.tensors.mxfp4 import PackedEntry
from racdeploy.tensors.safetensors import widen

ALIGNMENT = 32
"""Bytes: tensors begin at multiples of it."""
_SLAB_WEIGHTS = 2_097_152  # 8 MiB of float32: many rows of a large model, and little memory a core
_MOST_WORKERS = 8  # beyond, the disk is the slower part
Slab = tuple[int, NDArray[np.float32]]
Coded = tuple[NDArray[np.uint8], int]


@dataclass
class Body:
    """What all parts of a model share while their tensors, of ``total_bytes``, are written."""

    checkpoint: Checkpoint
    importance: Importance | None
    total_bytes: int
    progress: Progress | None
    _done_bytes: int = field(default=0, init=False)

    def append(self, file: Path, plan: Sequence[PlannedTensor]) -> list[ExportedTensor]:
        """Write tensors behind the header of a file, and return what became of them."""
        tensors = []
        with file.open("ab") as stream, ThreadPoolExecutor(_count_workers()) as pool:
            ends = end_places(stream.tell(), plan)
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
                tensors.append(_describe(tensor, zeros))

            stream.flush()
            os.fsync(stream.fileno())

        return tensors

    def _code(self, pool: ThreadPoolExecutor, tensor: PlannedTensor) -> Iterator[Coded]:
        """Yield the packed rows of a tensor slab by slab, in order, and their count of zeros."""
        quant = quants.load_ggml(tensor.quant_real)
        if packed := tensor.list_packed(self.checkpoint):
            yield from _copy(packed, quant, tensor)
            return

        if self.importance:
            known = tensor.importances(self.importance)
        else:
            known = [None]
        order_I = order_columns(tensor.transform, self.checkpoint.shape, tensor.shape[-1])
        if order_I is not None:
            known = [None if known_I is None else known_I[order_I] for known_I in known]

        def code(slab: Slab) -> Coded:
            part, weight_OI = slab
            known_I = known[part] if len(known) > 1 else known[0]
            packed_OP = np.ascontiguousarray(quant.quantize(weight_OI, known_I))

            stored_OI = quant.dequantize(packed_OP, weight_OI.shape[1])
            quants.check_finite(
                tensor.source, tensor.quant_real, weight_OI, stored_OI, wider="bf16 or f32"
            )
            return packed_OP, stored_OI.size - int(np.count_nonzero(stored_OI))

        yield from _map_ahead(pool, code, _iterate_slabs(self.checkpoint, tensor, _SLAB_WEIGHTS))


def _copy(
    packed: Iterable[PackedEntry], quant: quants.GgmlQuant, tensor: PlannedTensor
) -> Iterator[Coded]:
    """Yield matrices whose codes the file takes as they are."""
    for entry in packed:
        packed_OP = entry.read_as_ggml()
        stored_OI = quant.dequantize(packed_OP, tensor.shape[-1])
        quants.check_finite(tensor.source, tensor.quant_real, stored_OI, stored_OI, wider="")
        yield packed_OP, stored_OI.size - int(np.count_nonzero(stored_OI))


def divide(plan: list[PlannedTensor], part_bytes: int) -> list[list[PlannedTensor]]:
    """Return the tensors in runs of at most so many bytes, or of one tensor; 0 is one run."""
    parts: list[list[PlannedTensor]] = [[]]

    size_bytes = 0

    for tensor in plan:
        size_bytes += tensor.size_bytes
        if part_bytes and parts[-1] and size_bytes > part_bytes:
            parts.append([])
            size_bytes = tensor.size_bytes
        parts[-1].append(tensor)

    return parts


def _iterate_slabs(
    checkpoint: Checkpoint, tensor: PlannedTensor, slab_weights: int
) -> Iterator[Slab]:
    """Yield a tensor's values in llama.cpp's order, in slabs of rows of about so many weights.

    Each comes with the place of the array that it is of.
    """
    row_length = tensor.shape[-1]

    step = max(1, slab_weights // row_length)

    order_I = order_columns(tensor.transform, checkpoint.shape, row_length)
    missing = math.prod(tensor.shape[:-1])

    for part, raw in enumerate(tensor.read(checkpoint)):
        raw_OI = raw.reshape(-1, row_length)
        order_O = None
        missing -= len(raw_OI)
        if tensor.transform:
            order_O = order_rows(tensor.transform, checkpoint.shape, len(raw))
            if raw.ndim == 1 and order_O is not None:  # a bias is one row
                raw_OI = raw_OI[:, order_O]
                order_O = None

        for start in range(0, len(raw_OI), step):
            rows = slice(start, start + step)
            if order_O is None:
                stored_OI = raw_OI[rows]
            else:
                stored_OI = raw_OI[order_O[rows]]

            weight_OI = widen(stored_OI)
            if order_I is not None:
                weight_OI = weight_OI[:, order_I]
            if tensor.transform == "plus_one":
                weight_OI = weight_OI + np.float32(1)
            if tensor.transform == "decay":
                weight_OI = -np.exp(weight_OI)
            yield part, weight_OI

    for start in range(0, missing, step):
        rest = min(step, missing - start)
        yield 0, np.zeros((rest, row_length), np.float32)


def _map_ahead(
    pool: ThreadPoolExecutor,
    code: Callable[[Slab], Coded],
    slabs: Iterator[Slab],
) -> Iterator[Coded]:
    """Yield ``code`` of each slab in order; in memory is one slab for each worker, and one more."""
    pending: deque[Future[Coded]] = deque()
    for slab in slabs:
        pending.append(pool.submit(code, slab))
        if len(pending) > _count_workers():
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _count_workers() -> int:
    return min(available_cores(), _MOST_WORKERS)


def end_places(header_bytes: int, plan: Iterable[PlannedTensor]) -> Iterator[int]:
    """Yield where the header of a file ends, and then each tensor, with the padding behind it."""
    place = align(header_bytes)
    yield place
    for tensor in plan:
        place = align(place + tensor.size_bytes)
        yield place


def align(place: int) -> int:
    """Return the first place from this one on where a tensor may begin, or its padding ends."""
    return place + -place % ALIGNMENT


def _describe(tensor: PlannedTensor, zeros: int) -> ExportedTensor:
    return ExportedTensor(
        name=tensor.name,
        source=tensor.source,
        shape=tensor.shape,
        quant_asked=tensor.quant_asked,
        quant_real=tensor.quant_real,
        reason=tensor.reason,
        zeros=zeros / max(1, math.prod(tensor.shape)),
        size_bytes=tensor.size_bytes,
    )
