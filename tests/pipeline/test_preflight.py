"""What a build refuses before any work, because of files that its recipe names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build
from racdeploy.recipe import Recipe
from tests.support.errors import raises


def test_an_importance_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its inputs are other than those of the linear that it names."""
    name = "model.layers.0.mlp.down_proj.weight"
    tokens = {f"{name}.tokens": torch.tensor([5.0], dtype=torch.float64)}
    save_file({name: torch.ones(7)} | tokens, tmp_path / "other.safetensors")

    settings = {"quant": "q4_0", "importance": str(tmp_path / "other.safetensors")}
    job = Job(Recipe.combine(None, {"export": settings}))
    with raises("importance-of-other-model", "other.safetensors"):
        check_build(job, tmp_path / "bundle")
