"""Libraries in the user's cache, on demand: of racdeploy-kernels, or compiled.

A library is named by a hash of its sources, flags and processor, and by what made it: a compiler,
or racdeploy-kernels. It is found without either, and made again where anything else differs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.accel import prebuilt
from racdeploy.accel.source_list import (
    FLAGS,
    SOURCES,
    fingerprint,
    library_sources,
    machine_flags,
)
from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.storage import caches
from racdeploy.storage.files import canonical_hash
from racdeploy.storage.ownership import make_private, refuse_foreign
from racdeploy.storage.partials import partial_folder

KERNELS = library_sources("all")
INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "neon", "neon_i8mm")
_CHOICE = "RACDEPLOY_KERNELS"  # names one of them in place of the best; the C++ code reads it too
_PREBUILT = "prebuilt"  # in the name of a library, where that of a compiler is else
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
        only_compiled: why racdeploy-kernels cannot have it; empty where it can.
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
    only_compiled: str = ""

    def find(self) -> Path | None:
        """Return the newest library of this key, whatever made it, or None."""
        found = cache_folder().glob(f"{self._stem}-*.so")
        return max(found, key=os.path.getmtime, default=None)

    def find_prebuilt(self) -> bytes | str:
        """Return the library that racdeploy-kernels has, or why there is none to use."""
        if self.only_compiled:
            return self.only_compiled
        return prebuilt.read_library(self.name, self._fingerprint, self.machine)

    def build(self) -> Path:
        """Take it from racdeploy-kernels, or compile it unless this compiler has done so before.

        Raises:
            EnvironmentFailure: neither is there, the compiler failed, or there is no room.
        """
        content = "" if self.compiler else self.find_prebuilt()
        if isinstance(content, bytes):
            return self._write(_PREBUILT, lambda made: made.write_bytes(content))

        command = self.compiler or find_compiler()
        if command is None:
            compiler = "a compiler, for example with `apt-get install g++`, or name it in CXX"
            package = f"pip install --upgrade {prebuilt.PACKAGE}; or install {compiler}"
            raise EnvironmentFailure(
                f"there is no C++ compiler: c++, g++ and clang++ are not on the PATH; {content}",
                remedy=f"install {compiler}" if self.only_compiled else package,
            )

        maker = _digest(_version(command))
        file = self._place(maker)
        if not file.is_file():
            return self._write(maker, functools.partial(self._compile, command))

        if file != self.find():
            with contextlib.suppress(OSError):  # in a folder that is only read
                os.utime(file)  # the newest one is found
        return file

    def _place(self, maker: str) -> Path:
        return cache_folder() / f"{self._stem}-{maker}.so"

    def _write(self, maker: str, write: Callable[[Path], object]) -> Path:
        file = self._place(maker)
        try:
            make_private(file.parent)
            refuse_foreign(file.parent)
            with partial_folder(file.with_name("build")) as folder:
                write(folder / "library.so")
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
    def _fingerprint(self) -> str:
        return fingerprint(self.sources, self.machine, self.flags)

    @property
    def _stem(self) -> str:
        parts = {
            "fingerprint": self._fingerprint,
            "link_flags": self.link_flags,
            "key": self.key,
            "processor": [self.machine, _processor()],
        }

        return f"{self.name}-{_digest(parts)}"


def describe_maker(library: Path) -> str:
    """Return how a built library came to be: ``prebuilt``, or ``compiled``."""
    return _PREBUILT if library.stem.endswith(f"-{_PREBUILT}") else "compiled"


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{_digest(features)}"


def _version(command: str) -> str:
    return f"{command} {_call([command, '--version']).stdout}"


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
