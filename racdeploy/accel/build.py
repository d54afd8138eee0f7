"""Compile C++ sources of this package into the user's cache, on demand.

A library is named by a hash of its sources, flags and processor, and of the compiler that made it. It is found without
a compiler, and made anew where anything but the compiler differs. Knows no engine.
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

SOURCES = Path(__file__).parent / "sources"
KERNELS = ("sparse_matrix.cpp", "portable.cpp", "avx2.cpp", "avx512.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread")
# Each file is compiled for its own instruction set, and decides when it runs whether the processor has it.
_X86_FLAGS = {
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"),
    "avx512.cpp": tuple(
        f"-m{name}"
        for name in (
            "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bf16",
            "avx2", "fma", "f16c", "bmi2", "popcnt",
        )
    ),
}  # fmt: skip
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
        key: what else decides whether a built library may be used, as the version of the engine.
        executable: a program in place of a library.
    """

    name: str
    sources: tuple[str, ...]
    include: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    key: Mapping[str, str] = field(default_factory=dict)
    executable: bool = False

    def find(self) -> Path | None:
        """Return the newest library of this key, whatever compiled it, or None."""
        found = sorted(
            cache_folder().glob(f"{self._stem}-*.so"), key=lambda file: file.stat().st_mtime_ns
        )
        return found[-1] if found else None

    def build(self) -> Path:
        """Compile it, unless this compiler has done so before; return the file.

        Raises:
            EnvironmentFailure: there is no compiler, it failed, or the cache is not writable.
        """
        command = compiler()
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
                made = Path(folder) / "library.so"
                self._compile(command, made)
                os.replace(made, file)
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {file}: {error}",
                remedy="free the disk, or name another folder in RACDEPLOY_ACCEL",
            ) from error
        return file

    def _compile(self, command: str, made: Path) -> None:
        include = [f"-I{folder}" for folder in (SOURCES, *self.include)]
        objects = []
        for source in self.sources:
            objects.append(str(made.with_name(f"{Path(source).name}.o")))
            common = [
                command,
                *_FLAGS,
                *self.flags,
                *include,
                "-c",
                str(SOURCES / source),
                "-o",
                objects[-1],
            ]
            wanted = _machine_flags(source)
            # A compiler that does not know an instruction set compiles the file without: its kernels then never run.
            if wanted and not _run([*common, *wanted]):
                continue
            _require(common)
        kind = [] if self.executable else ["-shared"]
        places = (
            [f"-Wl,-rpath,{folder}" for folder in {link.parent for link in self.links}]
            if self.executable
            else []
        )
        _require(
            [
                command,
                *_FLAGS,
                *self.flags,
                *kind,
                *objects,
                *map(str, self.links),
                *places,
                "-o",
                str(made),
            ]
        )

    @property
    def _stem(self) -> str:
        headers = sorted(path.name for path in SOURCES.glob("*.h"))
        parts = {
            "files": {name: file_digest(SOURCES / name) for name in (*self.sources, *headers)},
            "flags": [
                *_FLAGS,
                *self.flags,
                *(flag for source in self.sources for flag in _machine_flags(source)),
            ],
            "key": dict(self.key),
            "processor": processor(),
        }
        return f"{self.name}-{_digest(json.dumps(parts, sort_keys=True))}"


def cache_folder() -> Path:
    """Return where libraries are kept: ``RACDEPLOY_ACCEL``, or ``racdeploy/accel`` under the user's cache."""
    return caches.cache_folder("accel", "RACDEPLOY_ACCEL")


@functools.cache
def compiler() -> str | None:
    """Return the C++ compiler's path, or None; ``CXX`` names one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@functools.cache
def processor() -> str:
    """Return the architecture and a hash of what the processor can do."""
    flags = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{_digest(flags)}"


@functools.cache
def _version(command: str) -> str:
    found = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=False, timeout=_COMPILE_S
    )
    return f"{command} {found.stdout}"


def _machine_flags(source: str) -> tuple[str, ...]:
    return _X86_FLAGS.get(source, ()) if platform.machine() in ("x86_64", "AMD64") else ()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(command: list[str]) -> str:
    """Run the compiler; return what it complains about, empty where it succeeded."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMPILE_S
        )
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_COMPILE_S:.0f} s"
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def _require(command: list[str]) -> None:
    if complaint := _run(command):
        raise EnvironmentFailure(
            f"{command[0]} failed: {' | '.join(complaint.splitlines()[:6])}",
            remedy="name another compiler in CXX; g++ 9 or clang++ 10 and newer know C++17",
        )
