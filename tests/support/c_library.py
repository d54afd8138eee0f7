"""libracdeploy and a program in C that calls it, built with CMake for the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from racdeploy.accel import SOURCES
from racdeploy.accel.installed_ggml import Ggml

PROJECT = SOURCES.parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "c"
SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
WARNINGS = "-Wall -Wextra -Werror"
APP = Path(__file__).parents[1] / "accel" / "c_library"
MODELS = APP.with_name("c_models")
_CROSS = {"aarch64": "aarch64-linux-gnu"}


@dataclass
class Driver:
    """The program of tests/accel/c_library; ``size_bytes`` is the last it was told."""

    command: tuple[str, ...]
    size_bytes: int = 0

    def run(self, *arguments: str, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        command = [*wrapper, *self.command, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def unpack(self, pairs: Iterable[tuple[Path, Path]]) -> list[tuple[int, str]]:
        """Unpack containers; return a status and a message for each."""
        done = self.run("unpack", *(str(path) for pair in pairs for path in pair))
        assert done.returncode == 0, done.stderr[-3000:]

        found = []
        for line in done.stdout.splitlines():
            status, size_bytes, message = line.split(" ", 2)
            self.size_bytes = int(size_bytes)
            found.append((int(status), message))
        return found

    def pipe(self, container: Path) -> tuple[int, bytes]:
        """Unpack a container through its descriptors; return the exit code and the plain file."""
        with container.open("rb") as stream:
            done = subprocess.run(
                [*self.command, "pipe"], stdin=stream, capture_output=True, check=False
            )
        return done.returncode, done.stdout


def install_library(
    folder: Path, shared: bool, flags: str = "", options: Sequence[str] = ()
) -> Path:
    """Build and install the library; return the prefix."""
    prefix = folder / "prefix"
    options = [
        *options,
        f"-DBUILD_SHARED_LIBS={'ON' if shared else 'OFF'}",
        f"-DCMAKE_CXX_FLAGS={flags}",
    ]
    _build(PROJECT, folder / "build", options)
    _run(["cmake", "--install", str(folder / "build"), "--prefix", str(prefix)])
    return prefix


def build_driver(
    folder: Path, installed: Path | None = None, flags: str = "", processor: str = ""
) -> Driver:
    """Build the program: with an installed library, or with the library as a part of its build."""
    options = [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    options += (
        [f"-DCMAKE_PREFIX_PATH={installed}"] if installed else [f"-DRACDEPLOY_SOURCES={PROJECT}"]
    )

    emulator: tuple[str, ...] = ()
    if processor:
        triple = _CROSS[processor]
        for program in (f"{triple}-g++", f"qemu-{processor}-static"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        options += cross_options(processor)
        emulator = (f"qemu-{processor}-static",)

    _build(APP, folder, options)
    return Driver((*emulator, str(folder / "driver")))


def cross_options(processor: str) -> list[str]:
    """Return CMake's options to build programs for another processor, linked statically."""
    triple = _CROSS[processor]
    return [
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        f"-DCMAKE_C_COMPILER={triple}-gcc",
        f"-DCMAKE_CXX_COMPILER={triple}-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    ]


def build_foreign_models(folder: Path, include: Path, libraries: Path, processor: str) -> Path:
    """Build the program of tests/accel/c_models with a ggml for another processor; return it."""
    options = [f"-DRACDEPLOY={PROJECT}", f"-DGGML_INCLUDE={include}", f"-DGGML_LIB={libraries}"]
    _build(MODELS, folder, [*options, *cross_options(processor)])
    return folder / "models"


def sparse_names(file: Path, least: float) -> list[str]:
    """Return the Q8_0 matrices of a GGUF file with so many zeros, read by gguf-py."""
    names = []
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name == "Q8_0":
            codes = np.asarray(tensor.data).reshape(-1, 34)[:, 2:]
            if np.mean(codes == 0) >= least:
                names.append(tensor.name)
    return names


def build_models(folder: Path, ggml: Ggml) -> Path:
    """Build the example, and the program of tests/accel/c_models, with the llama.cpp of a wheel."""
    options = [
        f"-DEXAMPLE={EXAMPLE}",
        f"-DRACDEPLOY={PROJECT}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ]
    options += [f"-DGGML_INCLUDE={ggml.include}", f"-DGGML_LIB={ggml.libraries}"]
    options += ["-DCMAKE_BUILD_TYPE=Checked", f"-DCMAKE_CXX_FLAGS={WARNINGS} -O1"]
    _build(MODELS, folder, options)
    return folder


def _build(source: Path, folder: Path, options: Sequence[str]) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    _run(["cmake", "-S", str(source), "-B", str(folder), *options])
    _run(["cmake", "--build", str(folder)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
