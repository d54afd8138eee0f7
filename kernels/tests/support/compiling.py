"""Targets of ``kernels/tests/CMakeLists.txt``, compiled where a test asks for one."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from racdeploy.files.writing import canonical_hash

_PROJECT = Path(__file__).parents[1]
_BUILDS = _PROJECT.parents[1] / "build" / "kernels-tests"
CROSS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
}
EMULATOR = "qemu-aarch64-static"


def build(target: str, **options: str) -> Path:
    """Compile a target as ``options`` for CMake say; what did not change is not compiled again."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")

    folder = _BUILDS / canonical_hash([sorted(options.items())])[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        given = [f"-D{name}={value}" for name, value in options.items()]
        run_cmake("-S", _PROJECT, "-B", folder, *given)
        run_cmake("--build", folder, "--target", target)

    files = [folder / target, folder / f"lib{target}.so"]
    return next(file for file in files if file.is_file())


def run_cmake(*arguments: object) -> None:
    """Run CMake; what it complains about is the test's failure."""
    command = ["cmake", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def find_wheel() -> Path:
    """Return the folder of the installed llama_cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    return Path(spec.origin).parent


def explain_no_arm() -> str:
    """Return what is missing to compile for ARM and to emulate it, or an empty string."""
    needed = {CROSS["CMAKE_CXX_COMPILER"]: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static"}
    for name, package in needed.items():
        if shutil.which(name) is None:
            return f"there is no {name}: apt-get install {package}"

    command = [EMULATOR, "-cpu", "help"]
    known = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cortex-a76" not in known.stdout:
        return f"{EMULATOR} is older than QEMU 7.0 and has no cortex-a76"
    return ""
