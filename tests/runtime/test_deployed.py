"""Models that racdeploy did not build are described by themselves, and by no manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from racdeploy import load
from racdeploy.quant.importance import Importance
from racdeploy.runtime.deployed import DeployedModel, find_model, find_plain, find_served
from tests.support.errors import raises
from tests.support.spoiled_gguf import add_float
from tests.support.tiny_artifacts import CONTEXT_TOKENS, EOS_ID, make_bundle, make_gguf


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DeployedModel:
    model = find_plain(make_gguf(tmp_path_factory.mktemp("plain")))
    assert model is not None
    return model


def test_a_plain_file_has_settings_of_its_own_and_no_manifest(plain: DeployedModel) -> None:
    """What nobody wrote down, such as hashes and a recipe, is absent."""
    assert plain.manifest is None
    assert plain.name == "model.gguf"
    assert plain.entry.backend == "llamacpp"
    assert plain.entry.quant == "f32"
    assert plain.settings.tokenizer.files == {}
    assert EOS_ID in plain.settings.tokenizer.eos_ids
    assert plain.context_limit == CONTEXT_TOKENS


def test_a_loaded_file_has_the_same_settings(plain: DeployedModel) -> None:
    with load(plain.path, threads=1) as model:
        assert model.settings == plain.settings


def test_a_model_behind_a_server_has_no_manifest(tmp_path: Path) -> None:
    """Not even where a bundle's tokenizer counts its texts."""
    bundle = find_model(make_bundle(tmp_path))
    assert bundle.manifest is not None
    served = find_served("http://localhost:1/v1", bundle)
    assert served.manifest is None
    assert (served.name, served.entry.backend) == ("http://localhost:1/v1", "server")
    assert served.settings.tokenizer == bundle.settings.tokenizer


def test_an_importance_matrix_is_no_model(tmp_path: Path) -> None:
    """It lies beside every GGUF artifact, and a pattern of names matches both."""
    file = tmp_path / "model.imatrix.gguf"
    known = Importance(tmp_path / "in", {"up": np.ones(32, np.float32)}, {"up": 9})
    known.write_imatrix(file, {"blk.0.ffn_up.weight": ["up"]})
    with raises("no-model-in-file", "imatrix"):
        find_plain(file)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_advice_that_no_sampler_takes_is_an_error_of_the_file(
    temperature: float, plain: DeployedModel, tmp_path: Path
) -> None:
    """In one line, as any other damage."""
    file = tmp_path / "m.gguf"
    add_float(plain.path, file, "general.sampling.temp", temperature)
    with raises("damaged-file", "sampling"):
        find_plain(file)
