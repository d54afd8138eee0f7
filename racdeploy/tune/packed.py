"""What a tensor takes in a packed file, found by packing random weights with as many zeros."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.recipe import Zeros, count_zeros, read_kept_of

_ROWS, _COLUMNS = 256, 2048  # of a matrix large enough for its table not to count


def expect_saved_bytes(packing: str, tensor: PlannedTensor, zeros: Zeros) -> float:
    """Return the bytes that packing is expected to leave out of a tensor with such zeros."""
    quant = tensor.quant_real
    if packings.load(packing).fits(quant, count_zeros(zeros)):
        return 0.0

    alike = zeros if isinstance(zeros, str) else round(zeros, 3)
    packed_bits = expect_packed_bits(packing, quant, alike)
    saved_bits = max(0.0, quants.load(quant).BITS - packed_bits)
    return saved_bits * math.prod(tensor.shape) / 8


@cache
def expect_packed_bits(packing: str, quant: str, zeros: Zeros) -> float:
    """Return the bits a weight of a matrix with a share of zeros, or N:M.

    Small weights are more likely to be zeros. Inputs decide as much, as where pruning weighs them:
    without them the codes that stay would be fewer, and the file too small by a twentieth.
    """
    form = quants.load_ggml(quant)
    kept_of = read_kept_of(zeros)
    shape = (_ROWS, _choose_columns(kept_of[1] if kept_of else 1, form.BLOCK))

    generator = np.random.default_rng(0)
    weight_OI = generator.standard_normal(shape).astype(np.float32)

    inputs_OI = np.exp(generator.standard_normal(shape))
    score_OI = np.abs(weight_OI) * inputs_OI
    weight_OI[_find_least(score_OI, zeros)] = 0

    packed_OP = form.quantize(weight_OI)

    with TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.gguf"
        _write(plain, packed_OP, form.GGML_TYPE)
        plugin = packings.load_gguf(packing)
        (row,) = plugin.pack_file(plain, plain.with_name(f"packed{plugin.SUFFIX}"))

    return 8 * row.stored_bytes / weight_OI.size


def _find_least(score_OI: NDArray[Any], zeros: Zeros) -> NDArray[np.bool_]:
    """Return True where a weight becomes zero: of all, or of each M, those with the least score."""
    kept_of = read_kept_of(zeros)
    # A group that does not fit is as good as any zeros.
    if kept_of is None or score_OI.shape[1] % kept_of[1]:
        bound = np.quantile(score_OI, count_zeros(zeros), method="higher")
        return np.asarray(score_OI <= bound)

    kept, of = kept_of
    rank_OGS = score_OI.reshape(len(score_OI), -1, of).argsort(axis=2).argsort(axis=2)
    return np.asarray(rank_OGS.reshape(score_OI.shape) < of - kept)


def _choose_columns(of: int, block: int) -> int:
    """Return how long rows are that groups of N:M and blocks divide, where there are such."""
    step = math.lcm(of, block)
    return _COLUMNS // step * step or _COLUMNS


def _write(file: Path, packed_OP: np.ndarray, ggml_type: int) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    try:
        kind = gguf.GGMLQuantizationType(ggml_type)
        writer.add_tensor("blk.0.ffn_up.weight", packed_OP, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
