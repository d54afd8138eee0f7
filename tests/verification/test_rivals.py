"""Rivals of the same size: which formats are chosen, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.exporting import ExportedTensor, ExportResult
from racdeploy.recipe import Export, Verification
from racdeploy.verification.rivals import SAME_SIZE, find_same_size_quants, note_missing_rivals

ROWS, ROW = 31_250, 256  # 8 million weights: a million bytes for each bit a weight takes
REST = 1_000_000


def _exported(bits: float) -> ExportResult:
    size_bytes = round(bits * 1e6)
    linear = ExportedTensor("blk.0.w", "w", (ROWS, ROW), "x", "x", "", 0.0, size_bytes)
    return ExportResult(Path("a.gguf"), (linear,), REST + size_bytes, {})


def _chosen(
    bits: float, sparsity: float = 0.0, row: int = ROW, packing: str = "bitmask"
) -> list[str]:
    shapes = {"w": (ROWS * ROW // row, row)}
    return find_same_size_quants(
        Export(packing=packing), "q8_0", _exported(8.5), _exported(bits), shapes, sparsity
    )


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [
        (8.5, 256, "q6_k"),  # q8_0 is the dense arm itself
        (8.5, 32, "q5_0"),  # rows that a K format cannot store
        (5.75, 256, "q5_k"),
        (5.3, 256, "q4_k"),
        (4.5, 256, "q4_k"),
    ],
)
def test_the_widest_format_that_is_no_larger_is_chosen(
    bits: float, row: int, expected: str
) -> None:
    """And K formats before others of the same width; of a packed artifact the packed size counts,
    alone.
    """
    assert _chosen(bits, 0.5, row) == [expected]


def test_a_plain_file_has_a_second_rival_for_its_size_without_zeros() -> None:
    """8.5 bits at half the zeros are 4.25 and one of mask: 5.25, where 5.5 is too large."""
    assert _chosen(8.5, 0.5, packing="plain") == ["q6_k", "q4_k"]


def test_a_second_graph_counts_as_the_size_without_zeros() -> None:
    """The standard file is plain; what the sparse kernels read is as small as a packed one."""
    assert _chosen(8.5, 0.5, packing="bitmask_op") == ["q6_k", "q4_k"]


def test_two_sizes_that_ask_for_one_format_give_one_rival() -> None:
    """Nothing is measured twice."""
    assert _chosen(5.6, 0.1, packing="plain") == ["q5_k"]


def test_nothing_fits_a_size_below_every_format_and_the_report_says_so() -> None:
    """No rival is no silence."""
    assert _chosen(0.5) == []
    assert (
        "every number format gives a larger file"
        in note_missing_rivals(Verification(controls=(SAME_SIZE,)), 0)[0]
    )
    assert (
        note_missing_rivals(Verification(controls=(SAME_SIZE,)), 1)
        == note_missing_rivals(Verification(), 0)
        == []
    )
