"""Compile C++ sources of this package into the user's cache, on demand.

A library is named by a hash of its sources, flags and processor, and of the compiler that made it.
It is found without a compiler, and compiled again where anything but the compiler differs. Knows no
engine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.storage import caches
from racdeploy.storage.files import file_sha256

SOURCES = Path(__file__).parent / "sources"
KERNELS = ("sparse_matrix.cpp", "portable.cpp", "avx2.cpp", "avx512.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread")
_AVX2 = "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt"
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512vnni"
# Each file is compiled for its own instruction set; when it runs, it asks the processor for it.
_X86_FLAGS = {"avx2.cpp": _AVX2, "avx512.cpp": f"{_AVX512} -mavx512bf16 {_AVX2}"}
_COMPILE_S = 300.0


@dataclass(frozen=True)
class Library:
    """A shared library, built or not.

    Args:
        name: begins the file's name.
        sources: files in ``sources/``; its headers are all part of the key.
        include: folders of further headers.
        links: libraries that it needs.
        flags: more for the compiler, behind the usual ones.
        link_flags: what the linker is to make of it.
        key: what else decides whether a built library may be used, as the version of the engine.
    """

    name: str
    sources: tuple[str, ...]
    include: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ("-shared",)
    key: Mapping[str, str] = field(default_factory=dict)

    def find(self) -> Path | None:
        """Return the newest library of this key, whatever compiled it, or None."""
        found = cache_folder().glob(f"{self._stem}-*.so")
        return max(found, key=os.path.getmtime, default=None)

    def build(self) -> Path:
        """Compile it, unless this compiler has done so before; return the file.

        Raises:
            EnvironmentFailure: there is no compiler, it failed, or the cache is not writable.
        """
        command = find_compiler()
        if command is None:
            raise EnvironmentFailure(
                "there is no C++ compiler: c++, g++ and clang++ are not on the PATH",
                remedy="install one, for example with `apt-get install g++`, or name it in CXX",
            )

        file = cache_folder() / f"{self._stem}-{_digest(_version(command))}.so"
        if file.is_file():
            return file

        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".build-") as folder:
                self._compile(command, Path(folder) / "library.so")
                os.replace(Path(folder) / "library.so", file)
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {file}: {error}",
                remedy="free the disk, or name another folder in RACDEPLOY_ACCEL",
            ) from error
        return file

    def _compile(self, command: str, made: Path) -> None:
        compiler = [command, *_FLAGS, *self.flags]
        include = [f"-I{folder}" for folder in (SOURCES, *self.include)]

        objects = []
        for source in self.sources:
            target = made.with_name(f"{Path(source).name}.o")
            objects.append(str(target))
            common = [*compiler, *include, "-c", str(SOURCES / source), "-o", str(target)]

            # A compiler without the instruction set compiles it plainly: its kernels never run.
            wanted = _machine_flags(source)
            if not wanted or _run([*common, *wanted]):
                _require(common)

        links = [str(file) for file in self.links]
        _require([*compiler, *self.link_flags, *objects, *links, "-o", str(made)])

    @property
    def _stem(self) -> str:
        headers = sorted(path.name for path in SOURCES.glob("*.h"))
        names = [*self.sources, *headers]
        files = {name: file_sha256(SOURCES / name) for name in names}

        flags = [*_FLAGS, *self.flags, *self.link_flags]
        for source in self.sources:
            flags += _machine_flags(source)

        parts = {"files": files, "flags": flags, "key": dict(self.key), "processor": _processor()}
        text = json.dumps(parts, sort_keys=True)
        return f"{self.name}-{_digest(text)}"


def cache_folder() -> Path:
    """Return where libraries are kept: ``RACDEPLOY_ACCEL``, or a part of the user's cache."""
    return caches.cache_folder("accel", "RACDEPLOY_ACCEL")


@functools.cache
def find_compiler() -> str | None:
    """Return the C++ compiler's path, or None; ``CXX`` names one."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    return None


@functools.cache
def _processor() -> str:
    """Return the architecture and a hash of what the processor can do."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")

    return f"{platform.machine()}-{_digest(flags)}"


@functools.cache
def _version(command: str) -> str:
    found = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=False, timeout=_COMPILE_S
    )
    return f"{command} {found.stdout}"


def _machine_flags(source: str) -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []

    flags = _X86_FLAGS.get(source, "")
    return flags.split()


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    """Run the compiler; return what it complains about, empty where it succeeded."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMPILE_S
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_COMPILE_S:.0f} s"

    if done.returncode == 0:
        return ""
    return done.stderr.strip() or f"exit code {done.returncode}"


def _require(command: list[str]) -> None:
    complaint = _run(command)
    if complaint:
        first_lines = complaint.splitlines()[:6]
        raise EnvironmentFailure(
            f"{command[0]} failed: {' | '.join(first_lines)}",
            remedy="name another compiler in CXX; g++ 9 or clang++ 10 and newer know C++17",
        )
