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
from pathlib import Path

import pytest

from racdeploy import accel
from racdeploy.accel.ggml_releases import read_table
from racdeploy.accel.installed_ggml import find_ggml
from racdeploy.accel.library import find_compiler
from racdeploy.accel.source_list import FLAGS, library_sources, machine_flags
from tests.support import wheel as wheels
from tests.support.wheel import ROOT, run

KERNELS = ROOT / "kernels"
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


def test_it_is_proven_with_the_newest_release_of_the_table() -> None:
    """With another one its library for llama.cpp is not taken, and the machine compiles one."""
    linux = _read_project(KERNELS)["tool"]["cibuildwheel"]["linux"]
    (pinned,) = (each for each in linux["test-requires"] if each.startswith("llama-cpp-python"))
    assert pinned == f"llama-cpp-python=={read_table()[-1].llama_cpp_python}"


PREBUILT = "prebuilt: racdeploy-kernels 1.2"
SLOW = "its avx2 kernels are not faster than ggml's own on this processor, on 1 thread"


@pytest.mark.parametrize(
    ("llamacpp", "onnxruntime", "expected"),
    [
        (("", PREBUILT), ("", PREBUILT), 0),
        ((SLOW, PREBUILT), ("", PREBUILT), 0),
        (("its self-test failed: q8_0", PREBUILT), ("", PREBUILT), 1),
        (("", PREBUILT), ("f16, 7 × 32, 1 tokens: it is off", PREBUILT), 1),
        (("ggml does not take it", PREBUILT), ("", PREBUILT), 1),
        (("", "compiled: racdeploy-kernels 1.2 is damaged"), ("", PREBUILT), 1),
        (("there is no libggml-base.so.0", ""), ("", PREBUILT), 1),
        (None, ("", PREBUILT), 1),
    ],
)
def test_what_is_not_proven_fails_where_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
    llamacpp: tuple[str, str] | None,
    onnxruntime: tuple[str, str],
    expected: int,
) -> None:
    """Slow kernels do not: machines that build are shared. On macOS llama.cpp has none."""
    built = {}
    for engine, made in (("llama.cpp", llamacpp), ("onnxruntime", onnxruntime)):
        if made is not None:
            refusal, maker = made
            library = Path("library.so") if maker else None
            built[engine] = accel.Built(library, refusal, maker=maker)
    monkeypatch.setattr(accel, "build_installed", lambda: built)
    check = runpy.run_path(str(KERNELS / "check_installed.py"))["main"]
    monkeypatch.setattr(sys, "platform", "linux")
    assert check() == expected
    monkeypatch.setattr(sys, "platform", "darwin")
    assert check() == (not onnxruntime[1] or bool(onnxruntime[0]))


def test_libracdeploy_has_the_version_that_comes_next() -> None:
    """As the changelog names it; a release compares it with the tag."""
    (written,) = re.findall(
        r"^project\(racdeploy VERSION (\S+) ",
        (ROOT / "racdeploy/accel/CMakeLists.txt").read_text(),
        re.M,
    )
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changes, re.M)
    assert newest is not None
    assert written == newest[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, and ``objects``; pip fetches the build's packages."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        pytest.skip(ggml)

    folder = tmp_path_factory.mktemp("kernels")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    if run(*pip, "download", "--no-deps", "--dest", folder / "probe", "scikit-build-core").code:
        pytest.skip("pip reaches no index")

    settings = []
    for setting in (
        f"build-dir={folder / 'objects'}",
        "cmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ):
        settings += ["--config-settings", setting]
    done = run(
        *pip,
        *("wheel", "--no-deps", "--wheel-dir", folder, *settings, KERNELS),
        RACDEPLOY_GGML_INCLUDE=str(ggml.include),
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
    assert {"kernels.json", "LICENSE"} <= names


@pytest.mark.slow
def test_what_is_compiled_is_what_the_fingerprint_says(built: Path) -> None:
    """Every file with the flags of racdeploy's own list."""
    text = (built / "objects" / "compile_commands.json").read_text(encoding="utf-8")
    compiled = [entry for entry in json.loads(text) if "/accel/sources/" in entry["file"]]
    for entry in compiled:
        own = machine_flags(Path(entry["file"]).name, platform.machine())
        given = [word for word in entry["command"].split() if word.startswith(("-m", "-f", "-O"))]
        expected = [word for word in (*FLAGS, *own) if word.startswith(("-m", "-f", "-O"))]
        assert sorted(set(given)) == sorted(set(expected)), entry["file"]

    names = sorted(Path(entry["file"]).name for entry in compiled)
    libraries = ("onnxruntime", "llamacpp")
    assert names == sorted(file for name in libraries for file in library_sources(name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_no_code_of_an_instruction_set_is_shared(built: Path) -> None:
    """A function that the linker merges with one of a common file would run on every processor."""
    machine = platform.machine()
    compiled = (built / "objects").rglob("*.o")
    objects = [file for file in compiled if machine_flags(file.stem, machine)]
    assert objects
    for file in objects:
        done = subprocess.run(["nm", "-C", str(file)], capture_output=True, text=True, check=True)
        assert re.findall(r" [WVu] .*", done.stdout) == [], file


@pytest.mark.slow
def test_kernels_are_proven_where_there_is_no_compiler(built: Path, tmp_path: Path) -> None:
    """In a fresh environment: as cibuildwheel tests it on the machines that build."""
    racdeploy, _ = wheels.build(ROOT, tmp_path / "dist")
    (wheel,) = built.glob("*.whl")
    programs = wheels.install(racdeploy, tmp_path / "fresh", wheel, packages=_ENGINES)

    clean = {"PATH": str(programs), "CXX": "", "RACDEPLOY_ACCEL": str(tmp_path / "accel")}
    done = run(programs / "python", KERNELS / "check_installed.py", **clean)
    assert done.code == 0, done.out + done.err
    assert done.out.count("prebuilt: racdeploy-kernels ") == 2
    made = {file.name.partition("-")[0] for file in (tmp_path / "accel").glob("*-prebuilt.so")}
    assert made == {"llamacpp", "onnxruntime"}

    done = run(programs / "racdeploy", "doctor", **clean)
    assert re.search(
        r"ok +prebuilt kernels: racdeploy-kernels \S+, for llama.cpp and onn", done.out
    )


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

    compiler = find_compiler()
    assert compiler is not None
    (tmp_path / "ask.cpp").write_text(_ASK)
    command = [compiler, str(tmp_path / "ask.cpp"), "-ldl", "-o", str(tmp_path / "ask")]
    subprocess.run(command, check=True)

    emulator = ["qemu-x86_64-static", "-cpu", processor]
    command = [*emulator, str(tmp_path / "ask"), library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]
