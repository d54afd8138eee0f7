"""A rising schedule: zeros stay, weights are solved anew, traces are mixed, and a step too far is
undone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.prune.calibrate import prune_blocks
from racdeploy.prune.patterns import Unstructured, Within
from racdeploy.recipe import Pruning, Recipe
from racdeploy.traces.mix import Probe, mix
from racdeploy.traces.trace import Trace
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_zeros_of_the_step_before_stay_zeros(tmp_path: Path, method: str) -> None:
    """The mask only grows, its size is exact, and kept weights come from the dense model again."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    folders = [tmp_path / "30", tmp_path / "60"]
    for folder, sparsity, within in zip(folders, (0.3, 0.6), (None, folders[0]), strict=True):
        folder.mkdir()
        prune_blocks(
            checkpoint, TRACES, [], Pruning(method=method, sparsity=sparsity), folder, within=within
        )
    before, after = (load_file(folder / "block-00001.safetensors") for folder in folders)
    for name, weight_OI in after.items():
        assert not weight_OI[before[name] == 0].any()
        assert int((weight_OI == 0).sum()) == round(0.6 * weight_OI.numel())


def test_weights_that_are_gone_go_first() -> None:
    """However important they look."""
    score_OI = torch.arange(24.0).view(4, 6)
    gone_OI = score_OI > 17
    keep_OI = Within(Unstructured(0.5), gone_OI).keep(score_OI)
    assert not keep_OI[gone_OI].any()
    assert int(keep_OI.sum()) == 12


def _trace(
    index: int, *, correct: bool, truncated: bool = False, thinking: int = 10, own: bool = False
) -> Trace:
    return Trace(
        index,
        "gcd",
        f"q{index}",
        "own" if own else "dense",
        (1,),
        (2,),
        None,
        thinking,
        truncated,
        correct,
    )


def test_own_good_traces_replace_dense_ones() -> None:
    """A quarter stays dense, evenly; wrong and truncated own traces are never used."""
    dense = [_trace(i, correct=True) for i in range(16)]
    own = [_trace(i, correct=i != 5, truncated=i == 9, own=True) for i in range(16)]
    mixed = mix(own, dense, 0.25)
    assert [t.index for t in mixed] == list(range(16))
    assert {i for i, t in enumerate(mixed) if t.gold == "dense"} == {3, 7, 11, 15, 5, 9}
    assert all(t.gold == "own" for t in mix(own[:4], dense[:4], 0.0))
    assert all(t.gold == "dense" for t in mix(own, dense, 1.0))


def test_the_probe_names_what_went_too_far() -> None:
    """Accuracy first, then length; within the limits it says nothing."""
    dense = [_trace(i, correct=True) for i in range(20)]
    worse = [replace(t, correct=t.index >= 3) for t in dense]
    longer = [replace(t, thinking_tokens=14) for t in dense]
    assert (
        Probe.of(worse, dense)
        .reason(Pruning(probe_drop=0.1))
        .startswith("accuracy 85.0% against 100.0%")
    )
    assert Probe.of(worse, dense).reason(Pruning(probe_drop=0.2)) == ""
    assert "1.40 times as long" in Probe.of(longer, dense).reason(Pruning(probe_length=1.3))
    assert Probe.of(dense, dense).reason(Pruning()) == ""


@pytest.mark.parametrize(
    "prune",
    [
        {"schedule": [0.5, 0.3, 0.6], "sparsity": 0.6},
        {"schedule": [0.3, 0.5], "sparsity": 0.6},
        {"schedule": [0.0, 0.5], "sparsity": 0.5},
        {"schedule": [0.5], "pattern": "2:4"},
        {"schedule": [0.3, 0.5], "sparsity": 0.5, "allocation": "error"},
    ],
)
def test_a_schedule_that_cannot_be_is_refused(prune: dict[str, object]) -> None:
    """Before any work."""
    with pytest.raises(UsageError, match="schedule"):
        Recipe.combine(None, {"prune": prune})


def _build(tmp_path: Path, **prune: object) -> Build:
    values = {
        "model": "tiny-reasoner",
        "traces": {"count": 6, "batch": 6, "max_new_tokens": 240, "temperature": 0},
        "prune": {"schedule": [0.3, 0.97], "sparsity": 0.97, **prune},
    }
    return Build(Job(Recipe.combine(None, values)), tmp_path / "work", threads=1)


def test_a_step_too_far_is_undone_and_said(tmp_path: Path) -> None:
    """At 97 % zeros the model answers nothing: the one at 30 % is what comes out, and a rerun finds
    it finished.
    """
    model = _build(tmp_path).prune()
    assert all(row.sparsity_reached == pytest.approx(0.3, abs=1e-3) for row in model.linears)
    assert model.notes[0].startswith("schedule, 30%: ")
    assert model.notes[-1].startswith("schedule, 97% was undone: accuracy")
    assert (model.sparsity, model.folder.name[-7:]) == (0.3, "-rac-30")
    assert {(row.sparsity_asked, row.reason) for row in model.linears} == {(0.3, "")}
    assert {(row.sparsity_asked, row.reason) for row in model.linears_beside(0.97)} == {
        (0.97, model.notes[-1])
    }
    assert model == _build(tmp_path).prune()
    with pytest.raises(UsageError, match="first step of the schedule"):
        _build(tmp_path, schedule=[0.97]).prune()
