"""Where caches are: one place under the user's, which a variable moves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from racdeploy.files.caches import cache_folder, default_work_folder


@pytest.mark.skipif(sys.platform != "linux", reason="the places of Linux")
def test_caches_are_where_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~/.cache/racdeploy``, below XDG_CACHE_HOME where that is set, or where a variable says."""
    for name in ("XDG_CACHE_HOME", "RACDEPLOY_WORK", "RACDEPLOY_ACCEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_work_folder() == tmp_path / ".cache/racdeploy"
    assert cache_folder("unpacked") == tmp_path / ".cache/racdeploy/unpacked"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("accel", "RACDEPLOY_ACCEL") == tmp_path / "xdg/racdeploy/accel"

    monkeypatch.setenv("RACDEPLOY_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "kernels"))
    assert default_work_folder() == tmp_path / "work"
    assert cache_folder("accel", "RACDEPLOY_ACCEL") == tmp_path / "kernels"
