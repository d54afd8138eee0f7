"""The plug-in for llama.cpp: which ggml it fits, how it is built, and its C functions.

An extra buffer type of ggml's CPU backend, as CPU_REPACK is one: its products run inside ggml's own
threads. It leans on declarations that ggml does not promise, so it is used only with versions whose
declarations were compared with ours.
Source: llama-cpp-python 0.3.36, ggml/src/ggml-cpu/traits.h and ggml-backend-impl.h.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from racdeploy.accel.library import KERNELS, Library
from racdeploy.accel.proof import Kernels
from racdeploy.errors import ArtifactError, EngineError
from racdeploy.storage.ggml_types import GGML_TYPES
from racdeploy.storage.gguf_header import Header, TensorInfo

QUANTS = ("q8_0", "q4_0", "f16", "bf16")  # what can be packed
NAMES = {GGML_TYPES[name].number: name for name in QUANTS}
# ggml version -> commits of llama.cpp whose private declarations are those of sources/ggml_abi.h
_KNOWN = {"0.25.3": ("0c1e570",)}
_COLUMNS = 32  # of every matrix a multiple

_BOOL, _I32, _I64, _F64 = ctypes.c_bool, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_TEXT, _DATA = ctypes.c_char_p, ctypes.c_void_p
_TEXTS, _I64S = ctypes.POINTER(_TEXT), ctypes.POINTER(_I64)
_MATRIX = (_I32, _I64, _I64, _DATA)  # number format, rows, columns, ggml's blocks
_PRODUCT = (_I32, _I64, _I64, _I64, _F64, _BOOL)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result first
    "rac_instruction_set": (_TEXT,),
    "rac_ggml_enable": (_BOOL, _TEXTS, _I64, _I32),
    "rac_ggml_keep": (_BOOL, _I32, _I64, _TEXTS, _I64S, _I64),
    "rac_ggml_maps_huge": (_BOOL, _I32, _I64),
    "rac_ggml_layout": (_I32,),
    "rac_ggml_pack": (_I64, *_MATRIX, _DATA, _I64, ctypes.POINTER(_I32)),
    "rac_ggml_packed": (_I64,),
    "rac_ggml_stored_bytes": (_I64, *_MATRIX),
    "rac_ggml_wanted_pattern": (_I32, *_MATRIX),
    "rac_ggml_difference": (_F64, *_PRODUCT, _I32, ctypes.c_uint64),
    "rac_ggml_time": (None, *_PRODUCT, _I32, _I32, ctypes.POINTER(_F64), ctypes.POINTER(_F64)),
}


@dataclass(frozen=True)
class Ggml:
    """The ggml of the installed llama-cpp-python.

    Args:
        libraries: folder of its shared libraries.
        include: folder of its public headers.
        version: as ggml says it.
        commit: of llama.cpp, as ggml says it; that of a build by pip ends with ``-dirty``.
    """

    libraries: Path
    include: Path
    version: str
    commit: str

    @property
    def refusal(self) -> str:
        """Why the plug-in is not for it; empty where it is."""
        if self.commit.partition("-")[0] not in _KNOWN.get(self.version, ()):
            known = [f"{version} ({', '.join(commits)})" for version, commits in _KNOWN.items()]
            return (
                f"ggml {self.version} ({self.commit}) is not one that the kernels were made for: "
                f"{', '.join(known)}"
            )

        header = self.include / "ggml-backend.h"
        if not header.is_file():
            return f"llama-cpp-python came without ggml's headers: there is no {header}"
        return ""


def find_ggml() -> Ggml | str:
    """Return llama-cpp-python's ggml, or why it cannot be used; llama.cpp is not loaded."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python is not installed"
    if not sys.platform.startswith("linux"):
        return f"the kernels are for Linux, not for {sys.platform}"

    package = Path(spec.origin).parent
    libraries = package / "lib"
    base = libraries / "libggml-base.so.0"
    if not base.is_file() or not (libraries / "libggml-cpu.so.0").is_file():
        return f"llama-cpp-python came without the shared libraries of ggml: there is no {base}"

    loaded = ctypes.CDLL(str(base))
    answers = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(loaded, name, None)
        if function is None:
            return f"{base} does not say its version"
        function.restype = ctypes.c_char_p
        answers.append(function().decode())

    ggml = Ggml(libraries, package.parent / "include", *answers)
    return ggml.refusal or ggml


def find_kernels() -> Kernels | str:
    """Return the plug-in for the installed ggml, or why there is none for it."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        return ggml

    library = Library(
        "llamacpp",
        (*KERNELS, "kept_file.cpp", "load_memory.cpp", "ggml_plugin.cpp", "ggml_trial.cpp"),
        include=(ggml.include,),
        links=(ggml.libraries / "libggml-cpu.so.0", ggml.libraries / "libggml-base.so.0"),
        key={"ggml": ggml.version, "commit": ggml.commit},
    )
    return Kernels(library, "racdeploy.accel.ggml_trial", "the sparse kernels are not built")


class Product(NamedTuple):
    """A random matrix and its activations, for trials, in the order of the C functions."""

    ggml_type: int
    rows: int
    columns: int
    tokens: int
    zeros: float
    two_of_four: bool  # 2 of each 4 weights are zero, in place of that share


class Plugin:
    """The plug-in, loaded into this process beside llama.cpp's libraries; it cannot be unloaded.

    Args:
        file: the built library.

    Raises:
        EngineError: it does not load.
    """

    def __init__(self, file: Path) -> None:
        # ggml's libraries have to be here first: the plug-in only names them.
        import llama_cpp  # noqa: F401

        try:
            self._library = ctypes.CDLL(str(file))
        except OSError as error:
            raise EngineError(
                f"{file} does not load: {error}", remedy="racdeploy accel build"
            ) from error

        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype = result
            function.argtypes = arguments

    @property
    def instruction_set(self) -> str:
        """The kernels that this processor gets: ``avx512``, ``avx2`` or ``portable``."""
        return str(self._library.rac_instruction_set().decode())

    @property
    def form(self) -> list[int | str]:
        """What decides how matrices are packed: a file of another form is not read."""
        layout = int(self._library.rac_ggml_layout())
        return [layout, self.instruction_set]

    def enable(self, names: Sequence[str], threads: int) -> bool:
        """Have the weights of these names packed when the next model is loaded.

        Returns:
            False where ggml does not take the plug-in: a model was loaded in this process before.
        """
        texts = _texts(names)
        enabled = self._library.rac_ggml_enable(texts, len(names), threads)
        return bool(enabled)

    def keep(self, stream: FileIO, places: Mapping[str, Sequence[int]]) -> bool:
        """Have the enabled weights taken from a file in which they are packed.

        Args:
            stream: the file; it may be closed then.
            places: of each matrix by its tensor's name: number format, pattern, rows, columns,
                first byte and bytes.

        Returns:
            False where the file cannot be mapped.
        """
        numbers: list[int] = []
        for place in places.values():
            numbers += place
        table = (_I64 * len(numbers))(*numbers)

        file = _describe(stream)
        names = _texts(list(places))
        mapped = self._library.rac_ggml_keep(*file, names, table, len(places))
        return bool(mapped)

    def maps_huge(self, stream: FileIO) -> bool:
        """Return whether the system maps this file in huge pages."""
        file = _describe(stream)
        return bool(self._library.rac_ggml_maps_huge(*file))

    def pack(
        self, path: Path, tensors: Sequence[TensorInfo]
    ) -> Iterator[tuple[tuple[int, int, int, int], memoryview]]:
        """Yield number format, pattern, rows, columns of each matrix, and it packed, by turns.

        Raises:
            ArtifactError: the file ended early.
        """
        most_bytes = max(_most_bytes(tensor) for tensor in tensors)
        packed_P = np.empty(most_bytes, np.uint8)
        memory = packed_P.ctypes.data, packed_P.nbytes
        pattern = ctypes.c_int32()

        for tensor, matrix in _read_matrices(path, tensors):
            size_bytes = self._library.rac_ggml_pack(*matrix, *memory, ctypes.byref(pattern))
            if size_bytes < 0:
                raise MemoryError(tensor.name)

            ggml_type, rows, columns, _ = matrix
            yield (ggml_type, pattern.value, rows, columns), packed_P.data[:size_bytes]

    def packed(self) -> int:
        """Return how many weights were packed since :meth:`enable`."""
        return int(self._library.rac_ggml_packed())

    def zeros(self, path: Path, header: Header, threads: int) -> dict[str, tuple[str, float]]:
        """Return format and share of zeros of each matrix to pack; ``FORMAT 2:4`` for that pattern.

        Raises:
            ArtifactError: the file ended early.
        """
        matrices = [tensor for tensor in header.tensors if _is_packable(tensor)]
        shares = [matrices[start::threads] for start in range(threads)]

        found: dict[str, tuple[str, float]] = {}
        with ThreadPoolExecutor(threads) as pool:
            for part in pool.map(lambda share: self._count_zeros(path, share), shares):
                found.update(part)
        return found

    def difference(self, product: Product, threads: int, seed: int) -> float:
        """Return the largest difference from ggml's own product, over its largest value.

        It is -1 where the weights are not given back as they were written.
        """
        difference = self._library.rac_ggml_difference(*product, threads, seed)
        return float(difference)

    def times_ms(self, product: Product, count: int, runs: int) -> tuple[float, float]:
        """Return what ggml's own product and the sparse one take over ``count`` equal matrices."""
        stock_ms = _F64()
        sparse_ms = _F64()

        results = ctypes.byref(stock_ms), ctypes.byref(sparse_ms)
        self._library.rac_ggml_time(*product, count, runs, *results)
        return stock_ms.value, sparse_ms.value

    def _count_zeros(
        self, path: Path, tensors: Sequence[TensorInfo]
    ) -> dict[str, tuple[str, float]]:
        found = {}
        for tensor, matrix in _read_matrices(path, tensors):
            ggml_type, rows, columns, _ = matrix

            stored_bits = 8 * self._library.rac_ggml_stored_bytes(*matrix)
            # Rounded down, a weight's bits are its code's: a scale takes half a bit of each weight.
            name = NAMES[ggml_type]
            code_bits = int(GGML_TYPES[name].bits)
            zeros = 1.0 - stored_bits / code_bits / (rows * columns)

            pattern = " 2:4" if self._library.rac_ggml_wanted_pattern(*matrix) else ""
            found[tensor.name] = name + pattern, zeros
        return found


def _read_matrices(
    path: Path, tensors: Sequence[TensorInfo]
) -> Iterator[tuple[TensorInfo, tuple[int, int, int, int]]]:
    """Yield number format, rows, columns and address of each matrix, into one place by turns.

    A map of the file would count as this process's memory.
    """
    most_bytes = max((tensor.size_bytes for tensor in tensors), default=0)
    blocks_P = np.empty(most_bytes, np.uint8)

    with path.open("rb", buffering=0) as stream:
        for tensor in tensors:
            stream.seek(tensor.position)
            _read_into(stream, blocks_P.data[: tensor.size_bytes])

            columns, rows = tensor.dimensions
            yield tensor, (tensor.ggml_type, rows, columns, blocks_P.ctypes.data)


def _read_into(stream: FileIO, part: memoryview) -> None:
    """Fill the part from the file, which the header says is long enough."""
    while part:
        count = stream.readinto(part)
        if not count:
            raise ArtifactError(f"{stream.name} ended while it was read", remedy="copy it again")

        part = part[count:]


def _texts(names: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [name.encode() for name in names]
    return (_TEXT * len(encoded))(*encoded)


def _describe(stream: FileIO) -> tuple[int, int]:
    """Return descriptor and bytes of an open file."""
    descriptor = stream.fileno()
    return descriptor, os.fstat(descriptor).st_size


def _most_bytes(matrix: TensorInfo) -> int:
    """Return two bytes a weight, and heads, offsets and padding: no packed matrix is larger."""
    columns, rows = matrix.dimensions
    groups = -(-columns // 256)  # a last one may be short, and has all of its head

    values_bytes = 2 * 256 * groups
    head_bytes = 48 * groups
    offset_bytes = 8
    return rows * (values_bytes + head_bytes + offset_bytes) + 512


def _is_packable(tensor: TensorInfo) -> bool:
    if tensor.ggml_type not in NAMES or len(tensor.dimensions) != 2:
        return False
    return tensor.dimensions[0] % _COLUMNS == 0
