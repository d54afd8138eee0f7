"""The plug-in on emulated ARM processors, inside the wheel's ggml, which is built for them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from racdeploy.accel.library import KERNELS, Library
from tests.support.llama_converter import fetch_source
from tests.support.sparse_kernels import ARM_COMPILER, ARM_EMULATOR, build_arm_kernels

_DRIVER = str(Path(__file__).with_name("plugin_driver.cpp"))
_OPTIONS = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": ARM_COMPILER.replace("g++", "gcc"),
    "CMAKE_CXX_COMPILER": ARM_COMPILER,
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_CPU_ARM_ARCH": "armv8.2-a+dotprod+fp16",  # a Cortex-A76, as llama.cpp builds for it
    "GGML_OPENMP": "OFF",
    "GGML_BUILD_TESTS": "OFF",
    "GGML_BUILD_EXAMPLES": "OFF",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in's driver with ggml, linked statically."""
    missing = build_arm_kernels()
    if isinstance(missing, str):
        pytest.skip(missing)
    if not shutil.which("cmake"):
        pytest.skip("there is no cmake")

    ggml = fetch_source(["/vendor/llama.cpp/ggml/"], "-ggml") / "ggml"
    (ggml / "ggml.pc.in").touch()  # the source package came without it
    build = tmp_path_factory.mktemp("ggml")
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    targets = ["--target", "ggml-base", "ggml-cpu"]
    for command in (
        ["-S", str(ggml), "-B", str(build), *options],
        ["--build", str(build), *targets],
    ):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    plugin = ("file_maps.cpp", "ggml_plugin.cpp", "ggml_extra.cpp", "ggml_trial.cpp", _DRIVER)
    libraries = tuple(build / "src" / f"lib{name}.a" for name in ("ggml-cpu", "ggml-base"))
    return Library(
        "driver-arm",
        (*KERNELS, *plugin),
        include=(ggml / "include",),
        links=libraries,
        link_flags=("-static",),
        machine="aarch64",
        compiler=ARM_COMPILER,
    ).build()


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["cortex-a76", "max"])
def test_products_are_those_of_llama_cpp_on_arm(driver: Path, processor: str) -> None:
    """Packing, reading back, kept files and products, with and without matrix products."""
    done = subprocess.run(
        [ARM_EMULATOR, "-cpu", processor, str(driver)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])  # one of its checks
    assert float(done.stdout) <= 1e-6
