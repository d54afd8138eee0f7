"""The plug-in on emulated ARM processors, inside the wheel's ggml, which is built for them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from racdeploy.accel.ggml_releases import read_table
from racdeploy.accel.installed_ggml import Ggml
from racdeploy.accel.library import Library
from racdeploy.accel.source_list import library_sources
from tests.support.c_library import build_foreign_models, sparse_names
from tests.support.llama_converter import fetch_source
from tests.support.sparse_kernels import ARM_COMPILER, ARM_EMULATOR, build_arm_kernels
from tests.support.tiny_artifacts import make_thinking_bundle

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
def ggml(tmp_path_factory: pytest.TempPathFactory) -> Ggml:
    """The wheel's ggml as static libraries."""
    missing = build_arm_kernels()
    if isinstance(missing, str):
        pytest.skip(missing)
    if not shutil.which("cmake"):
        pytest.skip("there is no cmake")

    source = fetch_source(["/vendor/llama.cpp/ggml/"], "-ggml") / "ggml"
    (source / "ggml.pc.in").touch()  # the source package came without it
    build = tmp_path_factory.mktemp("ggml")
    release = read_table()[-1]
    # Without git, which would ask the repository around it.
    named = {"GIT_EXE": "OFF", "GGML_BUILD_COMMIT": release.commit[:7]}
    options = [f"-D{name}={value}" for name, value in (_OPTIONS | named).items()]
    targets = ["--target", "ggml-base", "ggml-cpu"]
    for command in (
        ["-S", str(source), "-B", str(build), *options],
        ["--build", str(build), *targets],
    ):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    return Ggml(build / "src", source / "include", release.ggml, release.commit)


@pytest.fixture(scope="module")
def driver(ggml: Ggml) -> Path:
    """The plug-in's driver with ggml, linked statically."""
    return Library(
        "driver-arm",
        (*library_sources("llamacpp"), _DRIVER),
        include=(ggml.include,),
        links=tuple(ggml.libraries / f"lib{name}.a" for name in ("ggml-cpu", "ggml-base")),
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


@pytest.mark.slow
def test_libracdeploy_keeps_packed_weights_on_arm(ggml: Ggml, tmp_path: Path) -> None:
    """Which weights, why none, a kept file that is written once, found, and deleted."""
    program = build_foreign_models(
        tmp_path / "build", ggml.include, ggml.libraries, processor="aarch64"
    )
    bundle = make_thinking_bundle(tmp_path / "sparse", zeros=0.5, quant="q8_0")
    model = Path(shutil.copy(bundle / "model.gguf", tmp_path / "model.gguf"))

    def ask(*arguments: str | Path) -> list[str]:
        command = [ARM_EMULATOR, "-cpu", "cortex-a76", str(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
        return done.stdout.splitlines()

    assert ask("misuse") == []
    none = "no matrix of the file has enough zeros for the sparse kernels"
    assert ask("choose", model, "0.99") == [none, "0 "]
    (unmeasured, status) = ask("choose", model, "default")
    assert ("nobody has measured" in unmeasured, status) == (True, "0 ")

    kept_folder = tmp_path / "kept"
    kept_folder.mkdir()
    enabled = ask("enable", model, "0.3", kept_folder)
    assert enabled == [*sparse_names(model, 0.3), "0 "]
    (kept,) = kept_folder.glob("*.packed")
    written = kept.stat().st_mtime_ns
    assert 0 < kept.stat().st_size < 0.9 * model.stat().st_size
    assert ask("enable", model, "0.3", kept_folder) == enabled
    assert kept.stat().st_mtime_ns == written
    assert ask("forget", model, kept_folder) == ["0 "]
    assert not kept.exists()
