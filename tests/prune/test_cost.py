"""What pruning will take, and what the report says it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from racdeploy.checkpoint import Checkpoint
from racdeploy.job import Job
from racdeploy.pipeline import Build
from racdeploy.planning import pruning_plan
from racdeploy.prune.cost import cost_note, predict
from racdeploy.recipe import Pruning, Recipe
from tests.tiny_models import make_checkpoint


def _checkpoint(folder: Path, **config: int) -> Checkpoint:
    return Checkpoint(make_checkpoint(folder, "qwen2", **config))


def test_the_prediction_follows_the_shapes(tmp_path: Path) -> None:
    """Memory grows with width and window, not with depth; the bytes of statistic and block are among it."""
    base, deep, wide = (
        _checkpoint(tmp_path / name, **config)
        for name, config in (
            ("base", {"num_hidden_layers": 2, "intermediate_size": 96}),
            ("deep", {"num_hidden_layers": 6, "intermediate_size": 96}),
            ("wide", {"num_hidden_layers": 2, "intermediate_size": 3072}),
        )
    )
    costs = [predict(c, Pruning(), [40] * 20, [40] * 2, threads=1) for c in (base, deep, wide)]
    assert all(cost.seconds > 0 for cost in costs)
    page = 8 << 20  # the process itself grows a little between two calls
    assert abs(costs[1].peak_bytes - costs[0].peak_bytes) < page
    assert costs[2].peak_bytes - costs[0].peak_bytes > 4 * 4 * 3072**2 - page


@pytest.mark.parametrize(
    "settings", [{"pattern": "2:4"}, {"method": "wanda", "match_dense": False}, {"allocation": "owl"}]
)
def test_every_kind_of_recipe_has_a_prediction(tmp_path: Path, settings: dict[str, object]) -> None:
    """The sample is pruned with the recipe's own plugins."""
    cost = predict(_checkpoint(tmp_path / "m"), Pruning.model_validate(settings), [30] * 4, [], threads=1)
    assert cost.seconds > 0


def test_plan_and_report_say_what_pruning_takes(tmp_path: Path) -> None:
    """A bound before the traces are there, their tokens afterwards; then what it took beside what was predicted."""
    make_checkpoint(tmp_path / "model", "qwen3")
    options = {
        "model": str(tmp_path / "model"),
        "traces": {"count": 8, "batch": 4, "max_new_tokens": 12},
        "calibration": {"keep_truncated": True},
    }
    build = Build(Job(Recipe.combine(None, options)), tmp_path / "work", threads=1)
    before = pruning_plan(build)
    assert set(before) == {"prune_tokens_at_most", "prune_seconds_at_most", "prune_memory_bytes_at_most"}
    assert not (tmp_path / "work").exists(), "a plan leaves nothing behind"
    build.traces()
    after = pruning_plan(build)
    assert set(after) == {"prune_tokens", "prune_seconds", "prune_memory_bytes"}
    model = build.prune()
    assert after["prune_tokens"] == model.selection["calibration_tokens"] <= before["prune_tokens_at_most"]
    (note,) = model.notes
    assert note.startswith("pruning took ")
    assert "GiB" in note
    (file,) = (tmp_path / "work").glob("prune-*/cost.json")
    assert json.loads(file.read_text())["measured"]["peak_bytes"] > 50 << 20
    assert cost_note(tmp_path) == ""
