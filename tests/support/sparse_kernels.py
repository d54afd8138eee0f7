"""The C++ kernels for the tests, with numpy arrays: through ctypes, or on an emulated processor."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from racdeploy.accel.library import KERNELS, Library

_TESTS = Path(__file__).parents[1] / "accel"
C_API = _TESTS / "c_api.cpp"
SLACK_BYTES = 128
QUANTS = {"f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
K_QUANTS = {"q3_k": 11, "q6_k": 14}
NUMBERS = QUANTS | K_QUANTS
PATTERNS = {"unstructured": 0, "two_of_four": 1, "four_of_eight": 2}
FIXED_STRIDE = (  # formats and the patterns that store a fixed number of values of a row
    ("q8_0", "two_of_four"),
    ("q4_0", "two_of_four"),
    ("q8_0", "four_of_eight"),
    ("q4_0", "four_of_eight"),
)
# What each set of kernels makes of matrices that fit a pattern.
_X86, _NEON = ("two_of_four",), ("two_of_four", "four_of_eight")
_PREFERRED = dict.fromkeys(("avx2", "avx_vnni", "avx512"), _X86) | dict.fromkeys(
    ("neon", "neon_i8mm"), _NEON
)
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
_WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")


def build_kernels(*flags: str) -> Path:
    """Compile the kernels and their C function; return the library."""
    return Library("test-kernels", (*KERNELS, str(C_API)), flags=(*_WARNINGS, *flags)).build()


@functools.cache
def build_arm_kernels() -> Path | str:
    """Compile the kernels for AArch64 into a program; return it, or what is missing for that."""
    needed = {ARM_COMPILER: "g++-aarch64-linux-gnu", ARM_EMULATOR: "qemu-user-static"}
    for name, package in needed.items():
        if shutil.which(name) is None:
            return f"there is no {name}: apt-get install {package}"

    command = [ARM_EMULATOR, "-cpu", "help"]
    known = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cortex-a76" not in known.stdout:
        return f"{ARM_EMULATOR} is older than QEMU 7.0 and has no cortex-a76"

    sources = (*KERNELS, str(C_API), str(_TESTS / "kernel_driver.cpp"))
    return Library(
        "test-kernels-arm",
        sources,
        flags=_WARNINGS,
        link_flags=("-static",),
        machine="aarch64",
        compiler=ARM_COMPILER,
    ).build()


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
    program = build_arm_kernels()
    assert isinstance(program, Path), program
    command = [ARM_EMULATOR, "-cpu", processor, str(program)]
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
        return [NUMBERS[self.quant], PATTERNS[self.pattern], self.rows, self.columns]

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

    def preferred_pattern(self, quant: str, pattern: str) -> str:
        """Return how these kernels pack what fits a pattern: not all gain from a fixed stride."""
        return pattern if pattern in _PREFERRED.get(self._instruction_set, ()) else "unstructured"

    def wanted_pattern(self, quant: str, blocks: np.ndarray, columns: int) -> str:
        numbers = [NUMBERS[quant], len(blocks), columns]
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
        matrix = [NUMBERS[quant], PATTERNS[pattern], columns]

        counts = np.zeros(rows, np.int64)
        for begin, end in ((0, cut), (cut, rows)):
            self._call("count", [*matrix, begin, end], [blocks, counts])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

        heads_bytes = self._call("heads_bytes", [NUMBERS[quant], rows, columns], [])
        heads = np.full(heads_bytes, 0xAA, np.uint8)
        values = np.full(offsets[-1] + SLACK_BYTES, 0xAA, np.uint8)
        for begin, end in ((cut, rows), (0, cut)):
            self._call("pack", [*matrix, begin, end], [blocks, offsets, heads, values])
        return Packed(quant, pattern, rows, columns, heads, values, offsets)

    def unpack(self, packed: Packed) -> np.ndarray:
        row_bytes = self._call("row_bytes", [NUMBERS[packed.quant], packed.columns], [])
        blocks = np.full((packed.rows, row_bytes), 0xAA, np.uint8)
        self._call("unpack", [*packed.numbers, 0, packed.rows], [*packed.arrays, blocks])
        return blocks

    def valid(self, packed: Packed) -> bool:
        size = len(packed.values) - SLACK_BYTES
        return bool(self._call("valid", [*packed.numbers, size], packed.arrays))

    def prepare(self, quant: str, activation_TI: np.ndarray) -> np.ndarray:
        tokens, columns = activation_TI.shape
        size = self._call("workspace_bytes", [NUMBERS[quant], columns, tokens], [])
        unaligned = np.zeros(size + 64, np.uint8)
        start = -unaligned.ctypes.data % 64
        workspace = unaligned[start : start + size]
        for token in range(tokens):
            numbers = [NUMBERS[quant], columns, tokens, token]
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
