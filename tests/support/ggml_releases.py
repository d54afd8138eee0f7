"""Another release of llama-cpp-python for the plug-in: VERSION → a row of ``ggml_releases.toml``.

``python -m tests.support.ggml_releases VERSION`` has pip download its source package. The private
declarations that ``sources/ggml_abi.h`` repeats are compared with those of its ggml, and what moved
is printed with its place. The plug-in's object code has to be the same with its headers as with
those of the installed release: racdeploy-kernels has one library for both. Then that ggml is built,
the plug-in's driver runs against it by both ways in, and the release joins the table.
``--sdist FILE`` takes a source package that is here already, ``--folder FOLDER`` keeps what is
built. Needs cmake.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from racdeploy.accel.ggml_releases import TABLE, Release, read_table
from racdeploy.accel.installed_ggml import Ggml, find_ggml
from racdeploy.accel.library import KERNELS, Library, find_compiler
from racdeploy.accel.source_list import SOURCES, library_sources
from tests.support.declarations import Declaration, compare, read_declarations, read_headers

DRIVER = Path(__file__).parents[1] / "accel" / "plugin_driver.cpp"
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PRIVATE, DEVICE = "ggml_abi.h", "ggml_device_abi.h"
TOLERANCE = 1e-6  # as in a trial
_HEADERS = ("ggml-backend-impl.h", "ggml-cpu/traits.h", "ggml-cpu/ggml-cpu-impl.h")
_GGML = "vendor/llama.cpp/ggml/"
_HEAD = ".git/modules/vendor/llama.cpp/HEAD"
_PARTS = ("MAJOR", "MINOR", "PATCH")
_PARENT = "cmake_minimum_required(VERSION 3.18)\nproject(ggml_only C CXX)\nadd_subdirectory(ggml)\n"


def moved_declarations(source: Path, header: str = PRIVATE) -> dict[str, list[str]]:
    """Return how a ggml's declarations differ from those that a header of ours repeats, by name.

    Args:
        source: ggml's folder ``src``.
    """
    theirs = read_headers(source, _HEADERS)
    return compare(repeated_declarations(header), theirs)


def repeated_declarations(header: str = PRIVATE) -> dict[str, Declaration]:
    """Return what a header of the plug-in repeats of ggml's."""
    ours = SOURCES / header
    return read_declarations(ours.read_text(encoding="utf-8"), f"sources/{ours.name}")


def changed_objects(include: Path, known: Path, files: Sequence[str] = ()) -> list[str]:
    """Return sources of the plug-in whose object code is another one with other headers of ggml.

    Args:
        known: folder of a known release's headers.
        files: to compare; by default all that include ggml's headers.
    """
    every = {*library_sources("llamacpp"), *library_sources("llamacpp-device")}
    compared = files or sorted(every.difference(KERNELS))
    return [file for file in compared if _compile(file, include) != _compile(file, known)]


def build_driver(plugin: Library, *flags: str) -> Path:
    """Compile the driver of a plug-in's checks with the sanitizers; return the program."""
    libraries = plugin.links[0].parent
    return replace(
        plugin,
        name="driver",
        sources=(*plugin.sources, str(DRIVER)),
        flags=(*SANITIZED, *flags),
        link_flags=(f"-Wl,-rpath,{libraries}",),
    ).build()


def run_driver(program: Path) -> float:
    """Return the largest difference from ggml's own products.

    Raises:
        AssertionError: a check failed; a code is one of the driver's.
    """
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    return float(done.stdout)


def unpack(sdist: Path, folder: Path) -> tuple[Path, Release]:
    """Unpack the ggml of a source package; return its folder and what release it is."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive if _is_wanted(member.name)]
        archive.extractall(folder, members, filter="data")

    root = folder / sdist.name.removesuffix(".tar.gz")
    ggml = root / _GGML
    settings = (ggml / "CMakeLists.txt").read_text(encoding="utf-8")
    numbers = [_find(rf"GGML_VERSION_{part} (\d+)", settings) for part in _PARTS]

    commit = (root / _HEAD).read_text(encoding="ascii").strip()
    version = root.name.removeprefix("llama_cpp_python-")
    return ggml, Release(version, ".".join(numbers), commit)


def build_ggml(ggml: Path, release: Release, folder: Path) -> Ggml:
    """Build the two libraries that the plug-in links with."""
    # Alone, ggml would be a package of its own, of which the source package lacks parts.
    parent = ggml.parent / "CMakeLists.txt"
    parent.write_text(_PARENT, encoding="utf-8")
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON")
    _call("cmake", "-S", str(parent.parent), "-B", str(folder), *options)
    _call("cmake", "--build", str(folder), "--target", "ggml-base", "ggml-cpu")

    (library,) = folder.rglob("libggml-cpu.so.0")
    return Ggml(library.parent, ggml / "include", release.ggml, release.commit)


def add(release: Release, table: Path = TABLE) -> None:
    """Add a release to a table, which is ordered by their versions."""
    releases = {known.llama_cpp_python: known for known in read_table(table)}
    releases[release.llama_cpp_python] = release

    head, _, _ = table.read_text(encoding="utf-8").partition("[[release]]")
    parts = [head.rstrip("\n")]
    for known in sorted(releases.values(), key=order):
        rows = [f'{name} = "{value}"' for name, value in known._asdict().items()]
        parts.append("\n".join(["", "[[release]]", *rows]))

    table.write_text("\n".join([*parts, ""]), encoding="utf-8")


def order(release: Release) -> list[int]:
    """Return a release's version as numbers, to sort by."""
    return [int(number) for number in release.llama_cpp_python.split(".")]


def main(arguments: Sequence[str]) -> int:
    """Compare, build, run, add; 1 where a declaration moved, or the object code is another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).absolute()
        ggml, release = unpack(given.sdist or _download(given.version, folder), folder)
        assert release.llama_cpp_python == given.version, f"the package is {release}"
        print(f"ggml {release.ggml} of llama.cpp {release.commit}")

        moved = moved_declarations(ggml / "src")
        for changes in moved.values():
            print(*changes, sep="\n")
        if moved:
            print(f"{len(moved)} declarations moved: {', '.join(moved)}")
            return 1
        print(f"{len(repeated_declarations())} private declarations are ours")

        installed = find_ggml()
        assert isinstance(installed, Ggml), installed
        assert installed.is_known, installed
        changed = changed_objects(ggml / "include", installed.include)
        if changed:
            print(f"racdeploy-kernels needs a library for it: object code of {changed} is another")
            return 1
        print("the object code is that of the installed release")

        # Only said: where the device would be used, its self-test decides.
        for changes in moved_declarations(ggml / "src", DEVICE).values():
            print("Of the device's:", *changes, sep="\n")

        built = build_ggml(ggml, release, folder / f"build-{given.version}")
        for is_device in (False, True):
            difference = run_driver(build_driver(built.plugin(is_device)))
            assert difference <= TOLERANCE, difference
            name = "device's" if is_device else "plug-in's"
            print(f"the {name} checks hold, and products differ by {difference:.1e} at most")

    add(release)
    return 0


def _download(version: str, folder: Path) -> Path:
    package = "llama-cpp-python"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package]
    _call(*pip, f"{package}=={version}", "--dest", str(folder))
    (file,) = folder.glob(f"llama_cpp_python-{version}.tar.gz")
    return file


def _is_wanted(name: str) -> bool:
    _, _, path = name.partition("/")
    return path.startswith(_GGML) or path == _HEAD


def _compile(file: str, include: Path) -> bytes:
    """Return the object code of a source, plain, so that it has each offset and number."""
    compiler = find_compiler()
    assert compiler is not None
    folders = [f"-I{folder}" for folder in (SOURCES, include)]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "source.o"
        _call(compiler, "-std=c++17", "-fPIC", *folders, "-c", str(SOURCES / file), "-o", str(made))
        return made.read_bytes()


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern}"
    return match[1]


def _call(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
