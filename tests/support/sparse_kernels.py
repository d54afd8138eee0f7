"""The C++ kernels through ctypes, for the tests: the C functions with numpy arrays."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from racdeploy.accel.library import KERNELS, Library

C_API = Path(__file__).parents[1] / "accel" / "c_api.cpp"
SLACK_BYTES = 128
QUANTS = {"f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
PATTERNS = {"unstructured": 0, "two_of_four": 1}
_WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")


def build_kernels(*flags: str) -> Path:
    """Compile the kernels and their C functions; return the library."""
    return Library("test-kernels", (*KERNELS, str(C_API)), flags=(*_WARNINGS, *flags)).build()


class _View(ctypes.Structure):
    _fields_ = (
        ("quant", ctypes.c_int32),
        ("pattern", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("heads", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass
class Packed:
    """A packed matrix; ``values`` ends with the slack that kernels may read."""

    quant: str
    pattern: str
    rows: int
    columns: int
    heads: np.ndarray
    values: np.ndarray
    offsets: np.ndarray

    def view(self) -> _View:
        pointers = (self.heads.ctypes.data, self.values.ctypes.data, self.offsets.ctypes.data)
        return _View(QUANTS[self.quant], PATTERNS[self.pattern], self.rows, self.columns, *pointers)


class SparseKernels:
    """The library at ``path``."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("rac_row_bytes", "rac_heads_bytes", "rac_workspace_bytes"):
            getattr(self._library, name).restype = ctypes.c_int64
        self._library.rac_instruction_set.restype = ctypes.c_char_p

    def use(self, instruction_set: str) -> bool:
        """Choose the kernels; False where this processor lacks them."""
        return bool(self._library.rac_use_instruction_set(instruction_set.encode()))

    def preferred_pattern(self) -> str:
        """Return what these kernels make of a 2:4 matrix: only AVX2 gains from a fixed stride."""
        return "two_of_four" if self._library.rac_instruction_set() == b"avx2" else "unstructured"

    def wanted_pattern(self, quant: str, blocks: np.ndarray, columns: int) -> str:
        number = self._library.rac_wanted_pattern(
            QUANTS[quant], _int64(len(blocks)), _int64(columns), _pointer(blocks)
        )
        return list(PATTERNS)[number]

    def pack(
        self,
        quant: str,
        blocks: np.ndarray,
        columns: int,
        pattern: str = "unstructured",
        cut: int = 0,
    ) -> Packed:
        """Pack ggml's blocks, uint8 [rows, row bytes], in two calls that meet at row ``cut``."""
        rows = len(blocks)
        codes = (QUANTS[quant], PATTERNS[pattern])
        counts = np.zeros(rows, np.int64)
        for begin, end in ((0, cut), (cut, rows)):
            self._library.rac_count(
                *codes,
                _int64(columns),
                _pointer(blocks),
                _pointer(counts),
                _int64(begin),
                _int64(end),
            )
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        heads = np.full(
            self._library.rac_heads_bytes(QUANTS[quant], _int64(rows), _int64(columns)),
            0xAA,
            np.uint8,
        )
        values = np.full(offsets[-1] + SLACK_BYTES, 0xAA, np.uint8)
        for begin, end in ((cut, rows), (0, cut)):
            arrays = (_pointer(blocks), _pointer(offsets), _pointer(heads), _pointer(values))
            self._library.rac_pack(*codes, _int64(columns), *arrays, _int64(begin), _int64(end))
        return Packed(quant, pattern, rows, columns, heads, values, offsets)

    def unpack(self, packed: Packed) -> np.ndarray:
        row_bytes = self._library.rac_row_bytes(QUANTS[packed.quant], _int64(packed.columns))
        blocks = np.full((packed.rows, row_bytes), 0xAA, np.uint8)
        view = packed.view()
        self._library.rac_unpack(
            ctypes.byref(view), _pointer(blocks), _int64(0), _int64(packed.rows)
        )
        return blocks

    def valid(self, packed: Packed) -> bool:
        view = packed.view()
        return bool(
            self._library.rac_valid(ctypes.byref(view), _int64(len(packed.values) - SLACK_BYTES))
        )

    def prepare(self, quant: str, activation_TI: np.ndarray) -> np.ndarray:
        tokens, columns = activation_TI.shape
        size = self._library.rac_workspace_bytes(QUANTS[quant], _int64(columns), _int64(tokens))
        unaligned = np.zeros(size + 64, np.uint8)
        start = -unaligned.ctypes.data % 64
        workspace = unaligned[start : start + size]
        for token in range(tokens):
            self._library.rac_prepare(
                QUANTS[quant],
                _int64(columns),
                _int64(tokens),
                _int64(token),
                _pointer(activation_TI[token]),
                _pointer(workspace),
            )
        return workspace

    def multiply(self, packed: Packed, activation_TI: np.ndarray, cut: int = 0) -> np.ndarray:
        """Return output_TO, computed in two calls that meet at row ``cut``."""
        workspace = self.prepare(packed.quant, activation_TI)
        tokens = len(activation_TI)
        stride = packed.rows + 3
        output = np.full((tokens, stride), np.nan, np.float32)
        view = packed.view()
        for begin, end in ((0, cut), (cut, packed.rows)):
            arguments = (_int64(tokens), _pointer(workspace), _pointer(output), _int64(stride))
            self._library.rac_multiply(ctypes.byref(view), *arguments, _int64(begin), _int64(end))
        assert np.isnan(output[:, packed.rows :]).all()
        return output[:, : packed.rows]


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


_int64 = ctypes.c_int64
