"""Compile C++ sources of this package into the user's cache, on demand.

A library is named by a hash of its sources, flags and processor, and of the compiler that made it.
It is found without a compiler, and compiled again where anything but the compiler differs.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.storage import caches
from racdeploy.storage.files import canonical_hash, file_sha256
from racdeploy.storage.ownership import make_private, refuse_foreign
from racdeploy.storage.partials import partial_folder

SOURCES = Path(__file__).parent / "sources"
_NEON = ("neon.cpp", "neon_i8mm.cpp")
_X86 = ("avx2.cpp", "avx_vnni.cpp", "avx512.cpp")
KERNELS = ("sparse_matrix.cpp", "portable.cpp", *_X86, *_NEON)
INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "neon", "neon_i8mm")
_CHOICE = "RACDEPLOY_KERNELS"  # names one of them in place of the best; the C++ code reads it too
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread")
_AVX2 = "-mavx2 -mfma -mf16c -mbmi2 -mpopcnt"
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512vnni"
_ARM = "-march=armv8.2-a+dotprod"
# Each file is compiled for its own instruction set; when it runs, it asks the processor for it.
_X86_FLAGS = {
    "avx2.cpp": _AVX2,
    "avx_vnni.cpp": f"{_AVX2} -mavxvnni",
    "avx512.cpp": f"{_AVX512} -mavx512bf16 {_AVX2}",
}
_EVEX_VNNI = f"{_AVX2} -mavx512f -mavx512vl -mavx512vnni"  # the same instructions, encoded longer
_ARM_FLAGS = {"neon.cpp": _ARM, "neon_i8mm.cpp": f"{_ARM}+i8mm"}
_MACHINE_FLAGS = {
    "x86_64": _X86_FLAGS,
    "AMD64": _X86_FLAGS,
    "aarch64": _ARM_FLAGS,
    "arm64": _ARM_FLAGS,
}
_COMPILE_S = 300.0
_Command = Sequence[str | Path]


@dataclass(frozen=True)
class Library:
    """A shared library, built or not.

    Args:
        sources: files in ``sources/``; its headers are all part of the key.
        include: folders of further headers.
        flags: more for the compiler.
        key: what else decides whether a built library may be used, as the version of the engine.
        machine: that it is for, as ``platform.machine`` names it.
        compiler: its command; by default the first of ``CXX``, c++, g++ and clang++.
    """

    name: str
    sources: tuple[str, ...]
    include: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ("-shared",)
    key: Mapping[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=platform.machine)
    compiler: str | None = None

    def find(self) -> Path | None:
        """Return the newest library of this key, whatever compiled it, or None."""
        found = cache_folder().glob(f"{self._stem}-*.so")
        return max(found, key=os.path.getmtime, default=None)

    def build(self) -> Path:
        """Compile it, unless this compiler has done so before; return the file."""
        command = self.compiler or find_compiler()
        if command is None:
            raise EnvironmentFailure(
                "there is no C++ compiler: c++, g++ and clang++ are not on the PATH",
                remedy="install one, for example with `apt-get install g++`, or name it in CXX",
            )

        file = cache_folder() / f"{self._stem}-{_digest(_version(command))}.so"
        if file.is_file():
            return file

        try:
            make_private(file.parent)
            refuse_foreign(file.parent)
            with partial_folder(file.with_name("build")) as folder:
                self._compile(command, folder / "library.so")
                os.replace(folder / "library.so", file)
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {file}: {error}",
                remedy="free the disk, or name another folder in RACDEPLOY_ACCEL",
            ) from error

        return file

    def _compile(self, command: str, made: Path) -> None:
        compiler: list[str | Path] = [command, *FLAGS, *self.flags]
        compiler += [f"-I{folder}" for folder in (SOURCES, *self.include)]

        objects = []
        for source in self.sources:
            file = SOURCES / source
            target = made.with_name(f"{file.name}.o")
            objects.append(target)
            common = [*compiler, "-c", file, "-o", target]

            # A compiler without the instruction set compiles it plainly: its kernels never run.
            wanted = machine_flags(source, self.machine)
            if not wanted or _run([*common, *wanted]):
                _require(common)

        _require([*compiler, *self.link_flags, *objects, *self.links, "-o", made])

    @property
    def _stem(self) -> str:
        files = sorted(SOURCES.glob("*.h"))
        files += [SOURCES / name for name in self.sources]

        parts = {
            "files": {file.name: file_sha256(file) for file in files},
            "flags": [*FLAGS, *self.flags, *self.link_flags],
            "machine_flags": [machine_flags(name, self.machine) for name in self.sources],
            "key": self.key,
            "processor": [self.machine, _processor()],
        }

        return f"{self.name}-{_digest(parts)}"


def chosen_instruction_set() -> str:
    """Return the instruction set that ``RACDEPLOY_KERNELS`` names; empty for the best one.

    Raises:
        UsageError: there are no kernels of that name.
    """
    chosen = os.environ.get(_CHOICE, "")
    if chosen and chosen not in INSTRUCTION_SETS:
        raise UsageError(
            f"{_CHOICE} is {chosen!r}, and there are no kernels of that name",
            remedy=f"set it to one of {', '.join(INSTRUCTION_SETS)}, or to nothing for the best",
        )

    return chosen


def cache_folder() -> Path:
    """Return where libraries are kept: ``RACDEPLOY_ACCEL``, or a part of the user's cache."""
    return caches.accel_folder()


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
    return f"{platform.machine()}-{_digest(_features())}"


@functools.cache
def _features() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _version(command: str) -> str:
    return f"{command} {_call([command, '--version']).stdout}"


def machine_flags(source: str, machine: str) -> list[str]:
    """Return what a source file is compiled with besides, on a machine of this architecture."""
    flags = _MACHINE_FLAGS.get(machine, {}).get(source, "")

    features = _features().split()
    if "mavxvnni" in flags and "avx512_vnni" in features and "avx_vnni" not in features:
        flags = _EVEX_VNNI

    return flags.split()


def _digest(value: object) -> str:
    return canonical_hash(value)[:16]


def _call(command: _Command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMPILE_S,
    )


def _run(command: _Command) -> str:
    """Run the compiler; return what it complains about, empty where it succeeded."""
    try:
        done = _call(command)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {_COMPILE_S:.0f} s"

    if done.returncode == 0:
        return ""

    return done.stderr.strip() or f"exit code {done.returncode}"


def _require(command: _Command) -> None:
    if complaint := _run(command):
        first_lines = complaint.splitlines()[:6]
        raise EnvironmentFailure(
            f"{command[0]} failed: {' | '.join(first_lines)}",
            remedy="name another compiler in CXX; g++ 9 or clang++ 10 and newer know C++17",
        )
