"""The options stage: found once, under an address of everything that decides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.options_stage import OptionsStage
from racdeploy.pipeline.workplace import Workplace
from racdeploy.prune import options as module
from racdeploy.recipe import Calibration, Pruning
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


def test_a_survey_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back for the same options in any order; how many zeros a recipe wants changes nothing,
    and other options or traces are another stage.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    place, settings = Workplace(tmp_path / "work", 1), Pruning(sparsity=0.7)
    stage = OptionsStage(place, checkpoint, Calibration(), settings, ("q8_0", "q4_0"), ())
    found = stage.run(TRACES)
    assert found.linears.keys() == found.weights.keys()
    assert {*found.linears["model.layers.0.mlp.up_proj"]} == {"q4_0", "q8_0"}

    asked: list[object] = []

    def refuse(*given: object, **named: object) -> None:
        asked.append(given)
        raise AssertionError("surveyed again")

    monkeypatch.setattr(module, "survey_options", refuse)
    assert stage.run(TRACES) == found
    again = replace(stage, options=("q4_0", "q8_0"), settings=Pruning(sparsity=0.2, joint=True))
    assert again.run(TRACES) == found

    others = [(replace(stage, options=("q8_0",)), TRACES), (stage, TRACES[1:])]
    for other, traces in others:
        with pytest.raises(AssertionError, match="surveyed again"):
            other.run(traces)
    assert len(asked) == 2
