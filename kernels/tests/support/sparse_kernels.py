"""The C++ kernels for the tests, with numpy arrays: through ctypes, or on an emulated processor."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kernels.tests.support.compiling import CROSS, EMULATOR, build

SLACK_BYTES = 128
QUANTS = {"f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
PATTERNS = {"unstructured": 0, "two_of_four": 1}
TWO_OF_FOUR = ("q8_0", "q4_0")  # formats that may have this pattern
_PICKING = ("avx2", "avx_vnni", "neon", "neon_i8mm")  # kernels that are faster with it
_ONE_PATTERN = ("avx512",)  # and those that do not take it


class Calls(Protocol):
    """Something that calls ``rac_test_call``; arrays are changed in place."""

    def call(self, name: str, numbers: list[int], arrays: list[np.ndarray]) -> int: ...


class LibraryCalls:
    """The library at ``path``, in this process."""

    def __init__(self, path: Path) -> None:
        self._function = ctypes.CDLL(str(path)).rac_test_call
        self._function.restype = ctypes.c_int64

    def call(self, name: str, numbers: list[int], arrays: list[np.ndarray]) -> int:
        assert all(array.flags.c_contiguous for array in arrays)
        pointers = [array.ctypes.data for array in arrays]
        return int(
            self._function(
                name.encode(),
                (ctypes.c_int64 * len(numbers))(*numbers),
                (ctypes.c_void_p * len(arrays))(*pointers),
            )
        )


class EmulatedCalls:
    """The program of ``kernel_driver.cpp``, in a process on an emulated processor."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self._stdin = process.stdin
        self._stdout = process.stdout

    def call(self, name: str, numbers: list[int], arrays: list[np.ndarray]) -> int:
        sizes = [array.nbytes for array in arrays]
        parts = [_words(len(name)), name.encode()]
        parts += [_words(len(numbers), *numbers), _words(len(sizes), *sizes)]
        self._stdin.write(b"".join(parts + [array.tobytes() for array in arrays]))
        self._stdin.flush()

        result = int.from_bytes(self._read(8), "little", signed=True)
        for array in arrays:
            changed = np.frombuffer(self._read(array.nbytes), array.dtype)
            array[...] = changed.reshape(array.shape)
        return result

    def _read(self, size: int) -> bytes:
        found = self._stdout.read(size)
        assert len(found) == size, "the program on the emulated processor has crashed"
        return found


@contextmanager
def emulate(processor: str) -> Iterator[EmulatedCalls]:
    """Run the program on ``processor``, as QEMU names it, until the end of the context."""
    command = [EMULATOR, "-cpu", processor, str(build("kernel_driver", **CROSS))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield EmulatedCalls(process)
        assert process.stdin
        process.stdin.close()


def _words(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


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

    @property
    def numbers(self) -> list[int]:
        return [QUANTS[self.quant], PATTERNS[self.pattern], self.rows, self.columns]

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.heads, self.values, self.offsets]


class SparseKernels:
    """The kernels that ``calls`` reaches."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._instruction_set = ""

    @property
    def are_emulated(self) -> bool:
        """Whether they run on another processor than this one."""
        return isinstance(self._calls, EmulatedCalls)

    def use(self, instruction_set: str) -> bool:
        """Choose the kernels; False where this processor lacks them."""
        self._instruction_set = instruction_set
        name = np.frombuffer(f"{instruction_set}\0".encode(), np.uint8).copy()
        return bool(self._call("use", [], [name]))

    @property
    def pattern(self) -> str:
        """How these kernels pack what fits two_of_four: not all gain from a fixed stride."""
        return "two_of_four" if self._instruction_set in _PICKING else "unstructured"

    @property
    def takes_two_of_four(self) -> bool:
        """Whether these kernels multiply what is packed with a fixed stride."""
        return self._instruction_set not in _ONE_PATTERN

    def wanted_pattern(self, quant: str, blocks: np.ndarray, columns: int) -> str:
        numbers = [QUANTS[quant], len(blocks), columns]
        return list(PATTERNS)[self._call("preferred_pattern", numbers, [blocks])]

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
        matrix = [QUANTS[quant], PATTERNS[pattern], columns]

        counts = np.zeros(rows, np.int64)
        for begin, end in ((0, cut), (cut, rows)):
            self._call("count", [*matrix, begin, end], [blocks, counts])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

        heads_bytes = self._call("heads_bytes", [QUANTS[quant], rows, columns], [])
        heads = np.full(heads_bytes, 0xAA, np.uint8)
        values = np.full(offsets[-1] + SLACK_BYTES, 0xAA, np.uint8)
        for begin, end in ((cut, rows), (0, cut)):
            self._call("pack", [*matrix, begin, end], [blocks, offsets, heads, values])
        return Packed(quant, pattern, rows, columns, heads, values, offsets)

    def unpack(self, packed: Packed) -> np.ndarray:
        row_bytes = self._call("row_bytes", [QUANTS[packed.quant], packed.columns], [])
        blocks = np.full((packed.rows, row_bytes), 0xAA, np.uint8)
        self._call("unpack", [*packed.numbers, 0, packed.rows], [*packed.arrays, blocks])
        return blocks

    def valid(self, packed: Packed) -> bool:
        size = len(packed.values) - SLACK_BYTES
        return bool(self._call("valid", [*packed.numbers, size], packed.arrays))

    def prepare(self, quant: str, activation_TI: np.ndarray) -> np.ndarray:
        tokens, columns = activation_TI.shape
        size = self._call("workspace_bytes", [QUANTS[quant], columns, tokens], [])
        unaligned = np.zeros(size + 64, np.uint8)
        start = -unaligned.ctypes.data % 64
        workspace = unaligned[start : start + size]
        for token in range(tokens):
            numbers = [QUANTS[quant], columns, tokens, token]
            self._call("prepare", numbers, [activation_TI[token], workspace])
        return workspace

    def multiply(self, packed: Packed, activation_TI: np.ndarray, cut: int = 0) -> np.ndarray:
        """Return output_TO, computed in two calls that meet at row ``cut``."""
        workspace = self.prepare(packed.quant, activation_TI)
        tokens = len(activation_TI)
        stride = packed.rows + 3
        output = np.full((tokens, stride), np.nan, np.float32)
        for begin, end in ((0, cut), (cut, packed.rows)):
            numbers = [*packed.numbers, tokens, stride, begin, end]
            self._call("multiply", numbers, [*packed.arrays, workspace, output])
        assert np.isnan(output[:, packed.rows :]).all()
        return output[:, : packed.rows]

    def _call(self, name: str, numbers: list[int], arrays: list[np.ndarray]) -> int:
        return self._calls.call(name, [int(number) for number in numbers], arrays)
