"""What is left of a cut model: the sentence, the table, and the chart of its blocks."""

from __future__ import annotations

import re

import pytest

from racdeploy.report import html, markdown
from racdeploy.report.model import Kept, Record, Report, StructureRow
from racdeploy.report.structure import describe_kept, list_kept

DENSE = Kept(
    parameters=1_000_000,
    parameters_dense=1_000_000,
    blocks=4,
    blocks_dense=4,
    key_value_heads=2,
    key_value_heads_dense=2,
    vocabulary=512,
    vocabulary_dense=512,
)


def cut_to(report: Report, channels: list[int], heads: list[int], **whole: int) -> Report:
    """Return the report of a model whose blocks had 1,536 channels and 8 heads."""
    rows = tuple(
        StructureRow(
            block=block,
            source_block=block + 1,
            heads=own_heads,
            key_value_heads=2,
            channels=own,
            heads_dense=8,
            channels_dense=1536,
        )
        for block, (own, own_heads) in enumerate(zip(channels, heads, strict=True))
    )
    kept = DENSE.model_copy(update={"parameters": 700_000, **whole})
    return report.model_copy(update={"structure": rows, "kept": kept})


def test_nothing_is_said_where_nothing_was_cut(report: Report, records: list[Record]) -> None:
    """No sentence, no table, no section."""
    assert (describe_kept(None, ()), list_kept(None, ())) == ("", [])
    assert "What is left" not in html.render(report, records)
    assert "#### Kept" not in markdown.render(report)


def test_equal_widths_are_those_of_each_block(report: Report) -> None:
    """One width where all blocks are alike; what is whole is not listed."""
    cut = cut_to(report, [1152] * 4, [8] * 4)
    assert describe_kept(cut.kept, cut.structure) == (
        "70.0% of the parameters (700,000 of 1,000,000) and 75.0% of the feed-forward channels "
        "(1,152 of 1,536 in each block)"
    )
    assert f"Pruned keeps {describe_kept(cut.kept, cut.structure)}." in markdown.render(cut)


def test_different_widths_are_added_up_with_their_range(report: Report) -> None:
    """Of the blocks that are left; blocks and tokens that went are counted against the dense."""
    whole = {"blocks": 3, "vocabulary": 128, "key_value_heads": 1}
    cut = cut_to(report, [512, 768, 1024], [8, 6, 4], **whole)
    assert [part.row for part in list_kept(cut.kept, cut.structure)] == [
        ("parameters", "1,000,000", "700,000", "70.0%"),
        ("blocks", "4", "3", "75.0%"),
        ("feed-forward channels", "4,608", "2,304 in all, 512 to 1,024 a block", "50.0%"),
        ("query heads", "24", "18 in all, 4 to 8 a block", "75.0%"),
        ("key and value heads", "2", "1", "50.0%"),
        ("tokens of the vocabulary", "512", "128", "25.0%"),
    ]


@pytest.mark.parametrize(("heads", "kinds"), [([8, 6, 4], {"channels", "heads"}), ([8] * 3, None)])
def test_the_chart_has_a_bar_for_each_block(
    report: Report, records: list[Record], heads: list[int], kinds: set[str] | None
) -> None:
    """As high as the share that the block keeps; heads only where some of them went."""
    page = html.render(cut_to(report, [512, 768, 1536], heads), records)
    chart = page.split('aria-label="What each block keeps"')[1].split("</svg>")[0]
    bars = re.findall(r'<rect class="(\w+)" [^>]*height="([\d.]+)"', chart)
    assert {kind for kind, _ in bars} == (kinds or {"channels"})
    legend = page.split("Kept in each block")[1].split("</figcaption>")[0]
    assert ("query heads" in legend) == bool(kinds)
    first, second, third = [float(height) for kind, height in bars if kind == "channels"]
    assert first / third == pytest.approx(1 / 3, abs=0.001)
    assert second / third == pytest.approx(1 / 2, abs=0.001)
    assert "block 0, dense block 1: 512 of 1536 channels, 8 of 8 query heads" in chart
