"""What this machine is, as far as the system tells: processor, cores, memory, cache."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from racdeploy.storage.cores import available_cores

_ABOUT = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE_BYTES = 8 << 20  # where the system does not say
_TELLING = (
    *("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi2", "avx512_bf16"),
    *("amx_int8", "asimddp", "i8mm", "sve", "sve2", "sme"),
)
"""Flags of instructions for which llama.cpp has kernels."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """A machine; ``cores`` are those that this process may use."""

    name: str
    cores: int
    memory_bytes: int
    cache_bytes: int
    instructions: tuple[str, ...]

    @classmethod
    def read(cls) -> Self:
        """Return the machine at hand."""
        about = _read_about()
        name = about.get("model name") or about.get("Model") or platform.processor()
        flags = (about.get("flags") or about.get("Features") or "").split()
        known = tuple(flag for flag in _TELLING if flag in flags)
        return cls(
            name or platform.machine(),
            available_cores(),
            _count_memory(),
            _largest_cache() or _USUAL_CACHE_BYTES,
            known,
        )


def _read_about() -> dict[str, str]:
    """Return the first value of each line of what Linux says of its processors."""
    try:
        lines = _ABOUT.read_text().splitlines()
    except OSError:
        return {}

    about: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        about.setdefault(name.strip(), value.strip())
    return about


def _largest_cache() -> int:
    """Return the bytes of the last cache before memory; 0 where the system does not say."""
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        text = file.read_text().strip()
        number, unit = text[:-1], text[-1:]
        if number.isdecimal() and unit in _UNITS:
            sizes.append(int(number) * _UNITS[unit])
    return max(sizes)


def _count_memory() -> int:
    pages, page_bytes = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
    if not hasattr(os, "sysconf") or pages not in os.sysconf_names:
        return 1 << 32
    return os.sysconf(pages) * os.sysconf(page_bytes)
