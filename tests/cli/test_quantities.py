"""Sizes and times as people write them."""

from __future__ import annotations

import pytest

from racdeploy.cli.options import read_duration, read_size
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2000000", 2_000_000),
        ("10kB", 10_000),
        ("1.5GB", 1_500_000_000),
        ("1.5g", 1_500_000_000),
        ("512 MiB", 512 << 20),
        ("1KiB", 1024),
        ("4Gi", 4 << 30),
    ],
)
def test_a_size_has_a_unit_or_is_in_bytes(text: str, size_bytes: int) -> None:
    """Units of a thousand, and with an i those of 1,024."""
    assert read_size(text, "--max-bytes") == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("2h", 7200), ("45", 45), ("1.5h", 5400), ("30s", 30)]
)
def test_a_time_has_a_unit_or_is_in_seconds(text: str, seconds: float) -> None:
    """Seconds, minutes, hours or days."""
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5 parsecs", "1e9"])
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    """The option and what was written are named."""
    with raises("not-a-size", f"--max-bytes {text}"):
        read_size(text, "--max-bytes")
    with raises("not-a-time", f"--budget {text}"):
        read_duration(text)
