"""Which products and caches the processor has, as the system lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from racdeploy.processes import cores


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd", False),
        ("model name\t: avx512_bf16 of some kind", False),
    ],
)
def test_short_products_are_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: bool
) -> None:
    """On x86 and on ARM; a system without the list has none that are known."""
    monkeypatch.setattr(cores, "_CPU_INFO", tmp_path / "cpuinfo")
    assert not cores.has_bfloat16()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
    assert cores.has_bfloat16() == expected


def _write_cache(root: Path, core: int, index: int, level: int, size: str, shared: str) -> None:
    folder = root / f"cpu{core}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs an affinity to change")
def test_the_cache_of_all_own_cores_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last level of each core, and what cores share only once; 0 where nothing is listed."""
    monkeypatch.setattr(cores, "_CORES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert cores.last_level_cache_bytes() == 0

    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        _write_cache(tmp_path, core, 2, 2, "1024K", str(core))
        _write_cache(tmp_path, core, 3, 3, "32768K", shared)
    assert cores.last_level_cache_bytes() == 64 << 20

    (tmp_path / "cpu2" / "cache" / "index3" / "size").write_text("unknown")
    assert cores.last_level_cache_bytes() == 33 << 20
