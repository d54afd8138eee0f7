"""Which sources a library of kernels is made of, with which flags, from ``kernels.txt``.

Needs nothing but Python: the build of racdeploy-kernels takes the fingerprints that :mod:`prebuilt`
compares from this file alone, by ``kernels/fingerprint.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "sources"
_LIST = Path(__file__).with_name("kernels.txt")
_PROCESSORS = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}


class Source(NamedTuple):
    """A line of the list: libraries that a file is part of, processors, file, flags of its own."""

    libraries: tuple[str, ...]
    processors: str
    file: str
    flags: tuple[str, ...]


def _read_list() -> tuple[tuple[str, ...], tuple[Source, ...]]:
    flags: tuple[str, ...] = ()
    sources = []

    for line in _LIST.read_text(encoding="utf-8").splitlines():
        match line.split():
            case [] | ["#", *_]:
                pass
            case ["flags", *found]:
                flags = tuple(found)
            case [libraries, processors, file, *own]:
                names = tuple(libraries.split(","))
                sources.append(Source(names, processors, file, tuple(own)))

    return flags, tuple(sources)


FLAGS, _ALL = _read_list()


def library_sources(library: str) -> tuple[str, ...]:
    """Return the files of a library in ``sources/``; of ``all``, those that every one has."""
    wanted = {"all", library}
    return tuple(source.file for source in _ALL if wanted.intersection(source.libraries))


def machine_flags(file: str, machine: str) -> tuple[str, ...]:
    """Return the flags that are a file's own on a machine, as ``platform.machine`` names it."""
    processors = ("any", _PROCESSORS.get(machine, ""))
    found = (source for source in _ALL if source.file == file and source.processors in processors)
    return next((source.flags for source in found), ())


def fingerprint(files: Sequence[str], machine: str, flags: Sequence[str] = ()) -> str:
    """Return a hash of sources, of all headers, and of how they are compiled for a machine.

    Args:
        flags: beside those of all libraries.
    """
    read = [*sorted(SOURCES.glob("*.h")), *(SOURCES / file for file in files)]
    parts: Mapping[str, object] = {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in read},
        "flags": [*FLAGS, *flags],
        "machine_flags": {file: machine_flags(file, machine) for file in files},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
