"""Which products the processor has, as the system lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.processes import cores


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16 sse", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16 sse", False),
        ("flags\t\t: fpu amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd", False),
        ("model name\t: avx512_bf16 of some kind", False),
    ],
)
def test_fast_short_products_are_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: bool
) -> None:
    """On x86 and on ARM; a system without the list has none that are known."""
    monkeypatch.setattr(cores, "_CPU_INFO", tmp_path / "cpuinfo")
    assert not cores.has_fast_bfloat16()
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
    assert cores.has_fast_bfloat16() == expected
