"""The prune stage: builds for several number formats share what a survey decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning import CUT_PLAN_FILE
from racdeploy.recipe import Recipe
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


def test_a_survey_is_shared_by_number_formats_only(tmp_path: Path) -> None:
    """Its decision is what the other format's own survey decides; other settings ask again."""
    dense = make_checkpoint(tmp_path / "dense", "qwen3", intermediate_size=128)

    def prune(work: str, quant: str, sparsity: float = 0.0) -> tuple[bytes, bool]:
        """Return the plan of the cut, and whether the model was surveyed."""
        labels: set[str] = set()
        values = {
            "model": str(dense),
            "structure": {"keep": {"ffn": 0.75}},
            "prune": {"sparsity": sparsity},
        }
        build = Build(
            Job(Recipe.combine(None, values)),
            tmp_path / work,
            1,
            progress=lambda label, *_: labels.add(label),
        )
        linears = build.prune_stage.dense.shape.prunable_weights
        stage = replace(build.prune_stage, quants=dict.fromkeys(linears, quant))
        folder = stage.run(TRACES, "").folder.parent
        return (folder / CUT_PLAN_FILE).read_bytes(), "survey" in labels

    plan, is_surveyed = prune("work", "q8_0")
    assert is_surveyed
    assert prune("work", "q4_0") == (plan, False)
    assert prune("alone", "q4_0") == (plan, True)
    assert prune("work", "q4_0", sparsity=0.5)[1]
