"""A cut is warned of with what it cost a published model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from racdeploy import plugins
from racdeploy.pruning.structure.measured_costs import (
    DOWNLOAD_TEXT_KL,
    MODEL,
    note_text_costs,
)
from racdeploy.recipe import Structure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
_, _, _SECTION = RESULTS.read_text(encoding="utf-8").partition("### What a cut costs")
TABLE, _, _ = _SECTION.partition("\n#")


def _costs_of(part: str) -> dict[float, float]:
    return dict(plugins.read_constants("structures", part).get("TEXT_KL", {}))


def _note(keep: Mapping[str, float], *, is_recovered: bool = False) -> list[str]:
    return list(note_text_costs(Structure(keep=dict(keep)), is_recovered=is_recovered))


def test_every_figure_is_one_of_the_results() -> None:
    """Those of the model that the sentence names; so is the download's."""
    assert MODEL in TABLE
    (download,) = (row for row in TABLE.splitlines() if row.startswith("| llama.cpp's Q4_K_M |"))
    assert f"| {DOWNLOAD_TEXT_KL:g}," in download

    measured = {part: _costs_of(part) for part in plugins.list_names("structures")}
    assert measured["ffn"]
    for part, costs in measured.items():
        for share, kl in costs.items():
            (row,) = (row for row in TABLE.splitlines() if row.startswith(f"| `{part}={share:g}` "))
            assert f"| {kl:g}," in row


@pytest.mark.parametrize("kept", [0.75, 0.8])
def test_a_cut_costs_no_less_than_the_next_milder_one_that_was_measured(kept: float) -> None:
    share = min(each for each in _costs_of("ffn") if each >= kept)
    (note,) = _note({"ffn": kept})
    assert note.startswith(f"ffn={share:g} moved {MODEL} {_costs_of('ffn')[share]:.2g} nats")
    assert "nothing recovers it" in note
    assert "before recovery" in _note({"ffn": kept}, is_recovered=True)[0]


def test_what_was_not_measured_or_costs_nothing_is_no_warning() -> None:
    assert not _note({})
    assert not _note({"ffn": 1.0})
    assert not _note({"ffn": 0.99})
    assert not _note({"experts": 0.5})
