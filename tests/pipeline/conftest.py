"""What a bundle is written from: a tiny model, exported, with the sample report."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.exporting import write as export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.bundling import Artifact, BundleContents
from racdeploy.pipeline.job import Job
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Export, Recipe
from tests.support.sample_report import build_report
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="package")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model", "llama")


@pytest.fixture
def contents(exported_model: Path, tmp_path: Path) -> BundleContents:
    """A model that is its own pruned one, with the sample report."""
    settings = Export(quant="q8_0")
    result = export(Checkpoint(exported_model), tmp_path / "tiny.gguf", settings)
    pruned = PrunedModel(exported_model, 0.5, (), (), {})
    job = Job(Recipe(model=str(exported_model), export=settings))
    return BundleContents([Artifact("tiny", settings, result)], job, pruned, {}, build_report(), [])
