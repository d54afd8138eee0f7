"""Memory as Linux tells it: of the process, of the machine, and of a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.processes import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the system's files; nothing is in it."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    return tmp_path


def test_the_process_is_read_by_entry(system: Path) -> None:
    """In bytes; 0 where the system does not say."""
    assert memory.resident_bytes() == 0
    (system / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert memory.resident_bytes() == 1024 * 1024
    assert memory.resident_bytes("VmHWM") == 2048 * 1024


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("", 3 << 30), ("max", 3 << 30), (str(2 << 30), 1 << 30), (str(1 << 20), 0)],
)
def test_what_is_left_is_the_less_of_machine_and_container(
    system: Path, limit: str, expected: int
) -> None:
    """A container without a limit has what the machine has; one that is over it has nothing."""
    assert memory.free_bytes() is None
    (system / "meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable: {3 << 20} kB\n")
    if limit:
        (system / "memory.max").write_text(f"{limit}\n")
        (system / "memory.current").write_text(f"{1 << 30}\n")
    assert memory.free_bytes() == expected
