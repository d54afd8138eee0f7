"""The plug-in on emulated ARM processors, inside the wheel's ggml, which is built for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kernels.tests.support.compiling import CROSS, EMULATOR, build, explain_no_arm, run_cmake
from tests.support.llama_converter import fetch_source

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_CPU_ARM_ARCH": "armv8.2-a+dotprod+fp16",  # a Cortex-A76, as llama.cpp builds for it
    "GGML_OPENMP": "OFF",
    "GGML_BUILD_TESTS": "OFF",
    "GGML_BUILD_EXAMPLES": "OFF",
    # Without git, which would ask the repository around it.
    "GIT_EXE": "OFF",
    "GGML_BUILD_COMMIT": "unknown",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in's driver with the wheel's ggml, linked statically."""
    if missing := explain_no_arm():
        pytest.skip(missing)

    source = fetch_source(["/vendor/llama.cpp/ggml/"], "-ggml") / "ggml"
    (source / "ggml.pc.in").touch()  # the source package came without it
    folder = tmp_path_factory.mktemp("ggml")
    options = [f"-D{name}={value}" for name, value in (CROSS | _OPTIONS).items()]
    run_cmake("-S", source, "-B", folder, *options)
    run_cmake("--build", folder, "--target", "ggml-base", "ggml-cpu")

    libraries = [str(folder / "src" / f"lib{name}.a") for name in ("ggml-cpu", "ggml-base")]
    return build(
        "plugin_driver",
        **CROSS,
        RACDEPLOY_GGML_INCLUDE=str(source / "include"),
        RACDEPLOY_GGML_LIBRARIES=";".join(libraries),
    )


@pytest.mark.emulated
@pytest.mark.parametrize("processor", ["cortex-a76", "max"])
def test_products_are_those_of_llama_cpp_on_arm(driver: Path, processor: str) -> None:
    """Packing, reading back and products, with and without matrix products."""
    command = [EMULATOR, "-cpu", processor, str(driver)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])  # one of its checks
    assert float(done.stdout) <= 1e-6
