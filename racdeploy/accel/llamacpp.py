"""The plug-in for llama.cpp: which ggml it fits, where it is, and which weights of a file it takes.

An extra buffer type of ggml's CPU backend, as CPU_REPACK is one: its products run inside ggml's own threads. It leans
on declarations that ggml does not promise, so it is used with versions only whose declarations were compared with ours.
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
from typing import TYPE_CHECKING

import numpy as np

from racdeploy.accel.build import KERNELS, Library
from racdeploy.errors import ArtifactError, EngineError

if TYPE_CHECKING:
    from racdeploy.storage.gguf_header import Header, TensorInfo


QUANTS = {"q8_0": 8, "q4_0": 2, "f16": 1, "bf16": 30}
# ggml version -> commits of llama.cpp whose private declarations are those of sources/ggml_abi.h
_KNOWN = {"0.25.3": ("0c1e570",)}
_NAMES = {number: name for name, number in QUANTS.items()}
_VALUE_BITS = {8: 8, 2: 4, 1: 16, 30: 16}
_COLUMNS = 32


@dataclass(frozen=True)
class Ggml:
    """The ggml of the installed llama-cpp-python.

    Args:
        libraries: folder of its shared libraries.
        include: folder of its public headers.
        version: as ggml says it.
        commit: of llama.cpp, as ggml says it; ``-dirty`` is behind those that pip built.
    """

    libraries: Path
    include: Path
    version: str
    commit: str

    @property
    def refusal(self) -> str:
        """Why the plug-in is not for it; empty where it is."""
        if self.commit.partition("-")[0] not in _KNOWN.get(self.version, ()):
            known = ", ".join(
                f"{version} ({', '.join(commits)})" for version, commits in _KNOWN.items()
            )
            return f"ggml {self.version} ({self.commit}) is not one that the kernels were made for: {known}"
        if not (self.include / "ggml-backend.h").is_file():
            return f"llama-cpp-python came without ggml's headers: there is no {self.include / 'ggml-backend.h'}"
        return ""


def installed() -> Ggml | str:
    """Return the ggml that llama-cpp-python brings, or why it cannot be used; llama.cpp is not loaded."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python is not installed"
    if not sys.platform.startswith("linux"):
        return f"the kernels are for Linux, not for {sys.platform}"
    package = Path(spec.origin).parent
    base = package / "lib" / "libggml-base.so.0"
    if not base.is_file() or not (package / "lib" / "libggml-cpu.so.0").is_file():
        return f"llama-cpp-python came without the shared libraries of ggml: there is no {base}"
    found = ctypes.CDLL(str(base))
    said = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(found, name, None)
        if function is None:
            return f"{base} does not say its version"
        function.restype = ctypes.c_char_p
        said.append(function().decode())
    ggml = Ggml(package / "lib", package.parent / "include", *said)
    return ggml.refusal or ggml


def library(ggml: Ggml) -> Library:
    """Return the plug-in for a ggml, built or not."""
    return Library(
        "llamacpp",
        (*KERNELS, "kept_file.cpp", "ggml_plugin.cpp", "ggml_trial.cpp"),
        include=(ggml.include,),
        links=(ggml.libraries / "libggml-cpu.so.0", ggml.libraries / "libggml-base.so.0"),
        key={"ggml": ggml.version, "commit": ggml.commit},
    )


class Plugin:
    """The plug-in, loaded into this process beside llama.cpp's libraries; it cannot be unloaded.

    Args:
        file: the built library.

    Raises:
        EngineError: it does not load.
    """

    def __init__(self, file: Path) -> None:
        import llama_cpp  # noqa: F401 - ggml's libraries have to be here first: the plug-in names them only

        try:
            self._library = ctypes.CDLL(str(file))
        except OSError as error:
            raise EngineError(
                f"{file} does not load: {error}", remedy="racdeploy accel build"
            ) from error
        i32, i64, f64 = ctypes.c_int, ctypes.c_int64, ctypes.c_double
        signatures = {
            "rac_ggml_enable": (ctypes.c_bool, (ctypes.POINTER(ctypes.c_char_p), i64, i32)),
            "rac_ggml_keep": (
                ctypes.c_bool,
                (i32, i64, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(i64), i64),
            ),
            "rac_ggml_pack": (
                i64,
                (i32, i64, i64, ctypes.c_void_p, ctypes.c_void_p, i64, ctypes.POINTER(i32)),
            ),
            "rac_ggml_maps_huge": (ctypes.c_bool, (i32, i64)),
            "rac_ggml_layout": (i32, ()),
            "rac_ggml_packed": (None, (ctypes.POINTER(i64), ctypes.POINTER(i64))),
            "rac_ggml_stored_bytes": (i64, (i32, i64, i64, ctypes.c_void_p)),
            "rac_ggml_wanted_pattern": (i32, (i32, i64, i64, ctypes.c_void_p)),
            "rac_ggml_instruction_set": (ctypes.c_char_p, ()),
            "rac_ggml_difference": (
                f64,
                (i32, i64, i64, i64, i32, f64, ctypes.c_bool, ctypes.c_uint64),
            ),
            "rac_ggml_time": (
                None,
                (
                    i32,
                    i64,
                    i64,
                    i64,
                    f64,
                    ctypes.c_bool,
                    i32,
                    i32,
                    ctypes.POINTER(f64),
                    ctypes.POINTER(f64),
                ),
            ),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    @property
    def instruction_set(self) -> str:
        """The kernels that this processor gets: ``avx512``, ``avx2`` or ``portable``."""
        return str(self._library.rac_ggml_instruction_set().decode())

    def enable(self, names: list[str], threads: int) -> bool:
        """Have the weights of these names packed when the next model is loaded.

        Args:
            names: of tensors.
            threads: that pack.

        Returns:
            False where ggml does not take the plug-in: a model was loaded in this process before.
        """
        texts = [name.encode() for name in names]
        return bool(
            self._library.rac_ggml_enable(
                (ctypes.c_char_p * len(texts))(*texts), len(texts), threads
            )
        )

    @property
    def form(self) -> list[int | str]:
        """What decides how matrices are packed: a file of another form is not read."""
        return [int(self._library.rac_ggml_layout()), self.instruction_set]

    def keep(self, stream: FileIO, places: Mapping[str, Sequence[int]]) -> bool:
        """Have the next model's weights taken from a file in which they lie packed; after :meth:`enable`.

        Args:
            stream: the file; it may be closed then.
            places: number format, pattern, rows, columns, first byte and bytes of each matrix, by its tensor's name.

        Returns:
            False where the file cannot be mapped.
        """
        texts = [name.encode() for name in places]
        numbers = [number for place in places.values() for number in place]
        return bool(
            self._library.rac_ggml_keep(
                stream.fileno(),
                os.fstat(stream.fileno()).st_size,
                (ctypes.c_char_p * len(texts))(*texts),
                (ctypes.c_int64 * len(numbers))(*numbers),
                len(texts),
            )
        )

    def maps_huge(self, stream: FileIO) -> bool:
        """Return whether the system maps this file in huge pages."""
        return bool(
            self._library.rac_ggml_maps_huge(stream.fileno(), os.fstat(stream.fileno()).st_size)
        )

    def pack(
        self, path: Path, tensors: Sequence[TensorInfo]
    ) -> Iterator[tuple[tuple[int, int, int, int], memoryview]]:
        """Yield number format, pattern, rows and columns of each matrix, and how it is packed, until the next one.

        Raises:
            ArtifactError: the file ended early.
        """
        blocks_P = np.empty(max(t.size_bytes for t in tensors), np.uint8)
        packed_P = np.empty(max(_most_bytes(*t.dimensions) for t in tensors), np.uint8)
        pattern = ctypes.c_int()
        with path.open("rb", buffering=0) as stream:
            for tensor in tensors:
                stream.seek(tensor.position)
                _read_into(stream, blocks_P.data[: tensor.size_bytes])
                columns, rows = tensor.dimensions
                memory = blocks_P.ctypes.data, packed_P.ctypes.data, packed_P.nbytes
                size = self._library.rac_ggml_pack(
                    tensor.ggml_type, rows, columns, *memory, ctypes.byref(pattern)
                )
                if size < 0:
                    raise MemoryError(tensor.name)
                yield (tensor.ggml_type, pattern.value, rows, columns), packed_P.data[:size]

    def packed(self) -> tuple[int, int]:
        """Return how many weights were packed since :meth:`enable`, and the bytes that they take."""
        tensors, size_bytes = ctypes.c_int64(), ctypes.c_int64()
        self._library.rac_ggml_packed(ctypes.byref(tensors), ctypes.byref(size_bytes))
        return tensors.value, size_bytes.value

    def zeros(self, path: Path, header: Header, threads: int) -> dict[str, tuple[str, float]]:
        """Return number format and share of zeros of each matrix that can be packed; ``FORMAT 2:4`` for that pattern.

        Args:
            path: GGUF file.
            header: of it.
            threads: that read and count.

        Raises:
            ArtifactError: the file ended early.
        """
        tensors = [t for t in header.tensors if t.ggml_type in _NAMES and _is_matrix(t)]
        shares = [tensors[start::threads] for start in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(lambda share: self._zeros_of(path, share), shares))
        return {name: found for part in parts for name, found in part.items()}

    def difference(
        self,
        quant: str,
        rows: int,
        columns: int,
        tokens: int,
        threads: int,
        zeros: float,
        two_of_four: bool,
        seed: int,
    ) -> float:
        """Return the largest difference from ggml's own product over its largest value; -1 if weights are not kept."""
        shape = QUANTS[quant], rows, columns, tokens, threads, zeros, two_of_four, seed
        return float(self._library.rac_ggml_difference(*shape))

    def times_ms(
        self,
        quant: str,
        rows: int,
        columns: int,
        tokens: int,
        zeros: float,
        two_of_four: bool,
        count: int,
        runs: int,
    ) -> tuple[float, float]:
        """Return milliseconds of one thread in ggml's own product and in the sparse one, over ``count`` matrices."""
        stock, sparse = ctypes.c_double(), ctypes.c_double()
        shape = QUANTS[quant], rows, columns, tokens, zeros, two_of_four, count, runs
        self._library.rac_ggml_time(*shape, ctypes.byref(stock), ctypes.byref(sparse))
        return stock.value, sparse.value

    def _zeros_of(self, path: Path, tensors: Sequence[TensorInfo]) -> dict[str, tuple[str, float]]:
        """Read the matrices one after the other; a map of the file would count as this process's memory."""
        blocks_P = np.empty(max((t.size_bytes for t in tensors), default=0), np.uint8)
        found = {}
        with path.open("rb", buffering=0) as stream:
            for tensor in tensors:
                stream.seek(tensor.position)
                _read_into(stream, blocks_P.data[: tensor.size_bytes])
                columns, rows = tensor.dimensions
                matrix = tensor.ggml_type, rows, columns, blocks_P.ctypes.data
                stored = self._library.rac_ggml_stored_bytes(*matrix)
                pattern = " 2:4" if self._library.rac_ggml_wanted_pattern(*matrix) else ""
                zeros = 1.0 - 8.0 * stored / _VALUE_BITS[tensor.ggml_type] / (rows * columns)
                found[tensor.name] = _NAMES[tensor.ggml_type] + pattern, zeros
        return found


def _read_into(stream: FileIO, part: memoryview) -> None:
    """Fill the part from the file, which the header says is long enough."""
    done = 0
    while done < len(part):
        count = stream.readinto(part[done:])
        if not count:
            raise ArtifactError(f"{stream.name} ended while it was read", remedy="copy it again")
        done += count


def _most_bytes(columns: int, rows: int) -> int:
    """Return what no packed matrix is larger than: two bytes a weight, and heads, offsets and padding."""
    padded = (columns + 255) // 256 * 256
    return rows * (2 * padded + padded // 256 * 48 + 8) + 512


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.dimensions) == 2 and tensor.dimensions[0] % _COLUMNS == 0
