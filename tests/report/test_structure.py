"""What is left of a cut model: the sentence, and the table."""

from __future__ import annotations

from racdeploy.report import html, markdown
from racdeploy.report.structure import describe_remaining, list_remaining
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.pruning import KeptStructure, StructureRow
from racdeploy.results.report import Report

DENSE = KeptStructure(
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
    return report.model_copy(update={"structure": rows, "kept_structure": kept})


def test_nothing_is_said_where_nothing_was_cut(report: Report, records: list[AnswerRecord]) -> None:
    """No sentence, no table, no section."""
    assert (describe_remaining(None, ()), list_remaining(None, ())) == ("", [])
    assert "What is left" not in html.render(report, records)
    assert "#### Structure" not in markdown.render(report)


def test_equal_widths_are_those_of_each_block(report: Report) -> None:
    """One width where all blocks are alike; what is whole is not listed."""
    cut = cut_to(report, [1152] * 4, [8] * 4)
    assert describe_remaining(cut.kept_structure, cut.structure) == (
        "70.0% of the parameters (700,000 of 1,000,000) and 75.0% of the feed-forward channels "
        "(1,152 of 1,536 in each block)"
    )


def test_different_widths_are_added_up_with_their_range(report: Report) -> None:
    """Of the blocks that are left; blocks and tokens that went are counted against the dense."""
    whole = {"blocks": 3, "vocabulary": 128, "key_value_heads": 1}
    cut = cut_to(report, [512, 768, 1024], [8, 6, 4], **whole)
    assert [part.row for part in list_remaining(cut.kept_structure, cut.structure)] == [
        ("parameters", "1,000,000", "700,000", "70.0%"),
        ("blocks", "4", "3", "75.0%"),
        ("feed-forward channels", "4,608", "2,304 in all, 512 to 1,024 a block", "50.0%"),
        ("query heads", "24", "18 in all, 4 to 8 a block", "75.0%"),
        ("key and value heads", "2", "1", "50.0%"),
        ("tokens of the vocabulary", "512", "128", "25.0%"),
    ]
