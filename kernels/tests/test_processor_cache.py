"""The last-level caches of the cores that a process may use, as the system lists them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from racdeploy_kernels import processor_cache


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
    monkeypatch.setattr(processor_cache, "_CORES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert processor_cache.last_level_cache_bytes() == 0

    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        _write_cache(tmp_path, core, 2, 2, "1024K", str(core))
        _write_cache(tmp_path, core, 3, 3, "32768K", shared)
    assert processor_cache.last_level_cache_bytes() == 64 << 20

    (tmp_path / "cpu2" / "cache" / "index3" / "size").write_text("unknown")
    assert processor_cache.last_level_cache_bytes() == 33 << 20
