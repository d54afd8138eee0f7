"""The plug-in for llama.cpp: which one there is for the installed ggml, and its C functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError, EngineError
from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy.tensors.gguf_header import GgufHeader, TensorInfo
from racdeploy_kernels.installed_ggml import find_ggml
from racdeploy_kernels.library import PROVE, locate
from racdeploy_kernels.proof import EngineKernels

QUANTS = ("q8_0", "q4_0", "f16", "bf16")  # what can be packed
NAMES = {GGML_TYPES[name].type_id: name for name in QUANTS}
_COLUMNS = 32  # of every matrix a multiple
_TWO_OF_FOUR = 1  # the pattern
Zeros = dict[str, tuple[str, float]]

_BOOL, _I32, _I64, _F64 = ctypes.c_bool, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_TEXT, _DATA = ctypes.c_char_p, ctypes.c_void_p
_TEXTS = ctypes.POINTER(_TEXT)
_COUNTS, _TIMES = np.ctypeslib.ndpointer(np.int32), np.ctypeslib.ndpointer(np.float64)
_MATRIX = (_I32, _I64, _I64, _DATA)  # number format, rows, columns, ggml's blocks
_PRODUCT = (_I32, _I64, _I64, _I64, _F64, _BOOL)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result first
    "rac_instruction_set": (_TEXT,),
    "rac_ggml_enable": (_BOOL, _TEXTS, _I64, _I32),
    "rac_ggml_packed": (_I64,),
    "rac_ggml_stored_bytes": (_I64, *_MATRIX, ctypes.POINTER(_I32)),
    "rac_ggml_difference": (_F64, *_PRODUCT, _I32, ctypes.c_uint64),
    "rac_ggml_time": (None, *_PRODUCT, _I32, _COUNTS, _I32, _TIMES, _TIMES),
}


def find_kernels() -> EngineKernels | str:
    """Return the plug-in for the installed ggml, or why there is none for it."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        return ggml

    file = locate("llamacpp")
    if isinstance(file, str):
        return file
    return EngineKernels(file, "racdeploy_kernels.ggml_trial", " ".join(ggml))


class Matrix(NamedTuple):
    """A matrix in ggml's blocks at an address, in the order of the C functions."""

    ggml_type: int
    rows: int
    columns: int
    address: int


class Product(NamedTuple):
    """A random matrix and its activations, for trials, in the order of the C functions."""

    ggml_type: int
    rows: int
    columns: int
    tokens: int
    zeros: float
    two_of_four: bool  # 2 of each 4 weights are zero, in place of that share


class Plugin:
    """The plug-in, loaded into this process beside llama.cpp's libraries; it cannot be unloaded."""

    def __init__(self, file: Path) -> None:
        # ggml's libraries have to be here first: the plug-in only names them.
        import llama_cpp  # noqa: F401

        try:
            self._library = ctypes.CDLL(str(file))
        except OSError as error:
            raise EngineError(
                "kernels-not-loaded", f"{file} does not load: {error}", remedy=PROVE
            ) from error

        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype = result
            function.argtypes = arguments

        self._is_taken = _load_device(file)

    @property
    def instruction_set(self) -> str:
        """The kernels that this processor gets, such as ``avx512``, ``neon`` or ``portable``."""
        return str(self._library.rac_instruction_set().decode())

    def enable(self, names: Sequence[str], threads: int) -> bool:
        """Have the weights of these names packed when the next model is loaded.

        False where ggml does not take the plug-in, as one of another version of its interface.
        """
        texts = _texts(names)
        return self._is_taken and bool(self._library.rac_ggml_enable(texts, len(names), threads))

    def packed(self) -> int:
        """Return how many weights were packed since :meth:`enable`."""
        return int(self._library.rac_ggml_packed())

    def zeros(self, path: Path, header: GgufHeader, threads: int) -> Zeros:
        """Return format, or ``FORMAT 2:4``, and share of zeros of each matrix to pack."""
        matrices = [tensor for tensor in header.tensors if _is_packable(tensor)]

        def count_share(start: int) -> Zeros:
            share = _read_matrices(path, matrices[start::threads])
            return {name: self._count_zeros(matrix) for name, matrix in share}

        zeros: Zeros = {}
        with ThreadPoolExecutor(threads) as pool:
            for share in pool.map(count_share, range(threads)):
                zeros.update(share)

        return zeros

    def difference(self, product: Product, threads: int, seed: int) -> float:
        """Return the largest difference from ggml's own product, over its largest value.

        It is -1 where the weights are not given back as they were written.
        """
        return float(self._library.rac_ggml_difference(*product, threads, seed))

    def speedups(self, product: Product, count: int, threads: Sequence[int]) -> list[float]:
        """Return how much faster than ggml's own product the sparse one is on numbers of threads.

        Args:
            count: of equal matrices, each with a place of its own in memory.
        """
        stock_ms, sparse_ms = self.times_ms(product, count, threads)
        return list((stock_ms / sparse_ms).tolist())

    def times_ms(
        self, product: Product, count: int, threads: Sequence[int]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what ggml's own products and the sparse ones take, one for each thread at once.

        Arguments are those of :meth:`speedups`. What other programs disturbed is not a number.
        """
        counts = np.array(threads, np.int32)
        stock_ms, sparse_ms = np.empty((2, len(threads)))
        arrays = counts, len(threads), stock_ms, sparse_ms
        self._library.rac_ggml_time(*product, count, *arrays)
        return stock_ms, sparse_ms

    def _count_zeros(self, matrix: Matrix) -> tuple[str, float]:
        name = NAMES[matrix.ggml_type]
        pattern = _I32()
        stored_bits = 8 * self._library.rac_ggml_stored_bytes(*matrix, pattern)
        # Rounded down, a weight's bits are its code's: a scale takes half a bit of each weight.
        code_bits = int(GGML_TYPES[name].bits)

        zeros = 1.0 - stored_bits / code_bits / (matrix.rows * matrix.columns)
        is_two_of_four = pattern.value == _TWO_OF_FOUR
        return name + (" 2:4" if is_two_of_four else ""), zeros


def _load_device(file: Path) -> bool:
    """Have ggml load a library as a device; False where it is of another version's interface."""
    from llama_cpp.llama_cpp import _lib  # its ggml: under the name libggml.so lies another copy

    load = _lib.ggml_backend_load
    load.restype = _DATA
    load.argtypes = (_TEXT,)
    return load(os.fsencode(file)) is not None


def _read_matrices(path: Path, tensors: Sequence[TensorInfo]) -> Iterator[tuple[str, Matrix]]:
    """Read matrices into one place by turns: a map of the file would count as our memory."""
    max_bytes = max((tensor.size_bytes for tensor in tensors), default=0)
    blocks_P = np.empty(max_bytes, np.uint8)

    with path.open("rb") as stream:
        for tensor in tensors:
            part = blocks_P.data[: tensor.size_bytes]
            stream.seek(tensor.position)
            if stream.readinto(part) < tensor.size_bytes:
                raise ArtifactError(
                    "file-became-shorter", f"{path} ended while it was read", remedy="copy it again"
                )

            columns, rows = tensor.dimensions
            yield tensor.name, Matrix(tensor.ggml_type, rows, columns, blocks_P.ctypes.data)


def _texts(names: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [name.encode() for name in names]
    return (_TEXT * len(encoded))(*encoded)


def _is_packable(tensor: TensorInfo) -> bool:
    if tensor.ggml_type not in NAMES or len(tensor.dimensions) != 2:
        return False
    return tensor.dimensions[0] % _COLUMNS == 0
