"""racdeploy-kernels: its wheel serves every processor, and a machine without a compiler."""

from __future__ import annotations

import json
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import racdeploy_kernels
from kernels.tests.support.compiling import find_wheel
from racdeploy_kernels.proof import EngineKernels, Proof
from tests.support import wheel as wheels
from tests.support.wheel import ROOT, run

KERNELS = ROOT / "kernels"
FLAGS = {
    "avx2": "-mavx2",
    "avx_vnni": "-mavxvnni",
    "evex_vnni": "-mavx512vnni",
    "avx512": "-mavx512bf16",
}
_ENGINES = ("llama-cpp-python", "onnxruntime", "onnx")

_ASK = """
#include <dlfcn.h>
#include <stdio.h>
int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    return puts(reinterpret_cast<const char* (*)()>(dlsym(library, "rac_instruction_set"))()) < 0;
}
"""


def _read_project(folder: Path) -> dict[str, dict[str, object]]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_has_the_version_and_the_words_of_racdeploy() -> None:
    """One tag publishes both; where there is no tag, both have the same fallback."""
    ours, theirs = _read_project(KERNELS), _read_project(ROOT)
    scm, hatch = ours["tool"]["setuptools_scm"], theirs["tool"]["hatch"]["version"]
    assert scm["fallback_version"] == hatch["fallback-version"]
    assert scm["local_scheme"] == hatch["raw-options"]["local_scheme"]
    assert scm["tag_regex"] == hatch["tag-pattern"]

    for name in ("requires-python", "license"):
        assert ours["project"][name] == theirs["project"][name]
    extras = theirs["project"]["optional-dependencies"]
    assert extras["kernels"] == [ours["project"]["name"]]


@pytest.mark.parametrize(
    ("llamacpp", "onnxruntime", "expected"),
    [
        ("", "", 0),
        ("its self-test failed: q8_0", "", 1),
        ("", "f16, 7 × 32, 1 tokens: it is off", 1),
        (None, "", 1),
    ],
)
def test_what_is_not_proven_fails_where_it_is_built(
    monkeypatch: pytest.MonkeyPatch, llamacpp: str | None, onnxruntime: str, expected: int
) -> None:
    """Slow kernels do not: machines that build are shared. On macOS llama.cpp has none."""

    def find(engine: str, refusal: str | None) -> EngineKernels | str:
        if refusal is None:
            return "there is no libggml-base.so.0"
        return EngineKernels(Path("library.so"), refusal, engine)

    monkeypatch.setattr(EngineKernels, "prove", lambda kernels: Proof(kernels.trial, ""))
    answers = {"llama.cpp": llamacpp, "onnxruntime": onnxruntime}
    found = {engine: partial(find, engine, refusal) for engine, refusal in answers.items()}
    monkeypatch.setattr(racdeploy_kernels, "FINDERS", found)
    check = runpy.run_path(str(KERNELS / "check_installed.py"))["main"]
    monkeypatch.setattr(sys, "platform", "linux")
    assert check() == expected
    monkeypatch.setattr(sys, "platform", "darwin")
    assert check() == bool(onnxruntime)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
@pytest.mark.skipif(sys.platform == "darwin", reason="there llama.cpp has no kernels")
def test_a_build_without_the_headers_of_ggml_fails(tmp_path: Path) -> None:
    """A warning would be hidden by pip: kernels for onnxruntime alone have to be asked for."""
    where = "-DRACDEPLOY_GGML_INCLUDE=/nowhere"
    configure = partial(run, "cmake", "-S", KERNELS, "-B", tmp_path / "objects", where)
    assert "there is no /nowhere/ggml.h" in configure().err
    done = configure("-DRACDEPLOY_ONNXRUNTIME_ONLY=ON")
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel made of it, and ``objects``; pip fetches packages."""
    folder = tmp_path_factory.mktemp("kernels")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    if run(*pip, "download", "--no-deps", "--dest", folder / "probe", "scikit-build-core").code:
        pytest.skip("pip reaches no index")

    settings = []
    for setting in (
        f"build-dir={folder / 'objects'}",
        "cmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ):
        settings += ["--config-setting", setting]
    done = run(
        *(sys.executable, "-m", "build", "--outdir", folder, *settings, KERNELS),
        RACDEPLOY_GGML_INCLUDE=str(find_wheel().parent / "include"),
    )
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
def test_the_wheel_has_libraries_for_every_engine_and_python(built: Path) -> None:
    """And the licence."""
    (wheel,) = built.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    assert {name for name in names if name.endswith(".so")} == {"onnxruntime.so", "llamacpp.so"}
    assert {"ggml_headers.sha256", "LICENSE"} <= names


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags of x86-64")
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_each_instruction_set_is_compiled_for_itself(built: Path) -> None:
    """With its flags, and sharing no code: a function that the linker merges with one of a common
    file would run on every processor.
    """
    text = (built / "objects" / "compile_commands.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        name, words = Path(entry["file"]).stem, entry["command"].split()
        flag = FLAGS.get(name)
        assert flag is None or flag in words, entry["command"]
        assert flag or not any(word.startswith("-mavx") for word in words), name
        if flag:
            file = Path(entry["directory"]) / words[words.index("-o") + 1]
            done = subprocess.run(["nm", "-C", str(file)], capture_output=True, text=True)
            assert re.findall(r" [WVu] .*", done.stdout) == [], file


@pytest.mark.slow
def test_kernels_are_proven_where_there_is_no_compiler(built: Path, tmp_path: Path) -> None:
    """In a fresh environment: as cibuildwheel tests it on the machines that build."""
    racdeploy, _ = wheels.build(ROOT, tmp_path / "dist")
    (wheel,) = built.glob("*.whl")
    programs = wheels.install(racdeploy, tmp_path / "fresh", wheel, packages=_ENGINES)

    clean = {"PATH": str(programs), "CXX": "", "RACDEPLOY_ACCEL": str(tmp_path / "accel")}
    settings: Any = _read_project(KERNELS)["tool"]["cibuildwheel"]
    _, *arguments = settings["test-command"].format(project=ROOT).split()
    done = run(programs / "python", *arguments, **clean)
    assert done.code == 0, done.out + done.err
    done = run(programs / "racdeploy", "doctor", **clean)
    assert "sparse kernels for llama.cpp" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "expected"),
    [("Nehalem", "portable"), ("Haswell", "avx2")],
)
@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64-static") is None,
    reason="emulates x86-64 on x86-64: apt-get install qemu-user-static",
)
def test_one_library_serves_older_processors(
    built: Path, tmp_path: Path, processor: str, expected: str
) -> None:
    """It asks which instructions there are when it runs."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("racdeploy_kernels/onnxruntime.so", tmp_path)

    (tmp_path / "ask.cpp").write_text(_ASK)
    command = ["c++", str(tmp_path / "ask.cpp"), "-ldl", "-o", str(tmp_path / "ask")]
    subprocess.run(command, check=True)

    emulator = ["qemu-x86_64-static", "-cpu", processor]
    command = [*emulator, str(tmp_path / "ask"), library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]
