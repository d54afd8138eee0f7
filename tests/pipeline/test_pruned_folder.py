"""A pruned folder that a user names is taken, or refused with what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.pruned_folder import read_pruned
from racdeploy.recipe import Structure
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_training_run import make_training_run


def test_a_pruned_folder_is_taken(tmp_path: Path) -> None:
    """With its zeros; every block comes from the one of its number."""
    training_run = make_training_run(tmp_path)
    model = read_pruned(training_run.dense, training_run.sparse.folder)
    assert model.folder == training_run.sparse.folder
    assert model.sparsity == pytest.approx(0.5, abs=1e-3)
    assert tuple(model.source_blocks) == tuple(range(training_run.dense.shape.block_count))


def test_blocks_that_are_left_are_known_from_beside_the_folder(tmp_path: Path) -> None:
    """Where pruning wrote which; without that file nobody can tell."""
    cut = Structure(keep={"blocks": 0.5})
    training_run = make_training_run(tmp_path, structure=cut, num_hidden_layers=4)
    beside = shutil.copy(tmp_path / "blocks" / "structure.json", tmp_path)
    model = read_pruned(training_run.dense, training_run.sparse.folder)
    assert tuple(model.source_blocks) == tuple(training_run.sources)

    Path(beside).unlink()
    with raises("blocks-not-recorded"):
        read_pruned(training_run.dense, training_run.sparse.folder)


def test_what_was_not_pruned_is_refused(tmp_path: Path) -> None:
    """The dense model itself has nothing to get back."""
    training_run = make_training_run(tmp_path)
    with raises("nothing-to-recover"):
        read_pruned(training_run.dense, training_run.dense.folder)


@pytest.mark.parametrize(
    ("family", "sizes", "named"),
    [
        ("qwen3", {}, "model_type 'llama'"),
        ("llama", {"hidden_size": 128, "head_dim": 32}, "hidden_size 64"),
        ("llama", {"num_hidden_layers": 1}, "2 blocks"),
    ],
)
def test_a_model_of_another_shape_is_refused(
    tmp_path: Path, family: str, sizes: dict[str, int], named: str
) -> None:
    """With what differs, and both values."""
    training_run = make_training_run(tmp_path)
    other = Checkpoint(make_checkpoint(tmp_path / "other", family, **sizes))
    with raises("other-dense-model", named):
        read_pruned(other, training_run.sparse.folder)


def test_another_model_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    """Its embedding is not the pruned model's."""
    training_run = make_training_run(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with raises("other-dense-model"):
        read_pruned(make_training_run(other, seed=5).dense, training_run.sparse.folder)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """The dense model cannot grade what it cannot say."""
    training_run = make_training_run(tmp_path)
    config = training_run.sparse.folder / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "vocab_size": values["vocab_size"] - 32}))
    with raises("vocabulary-was-cut", "racdeploy build"):
        read_pruned(training_run.dense, training_run.sparse.folder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """As any other command refuses it."""
    training_run = make_training_run(tmp_path)
    with raises("no-model-folder", "nowhere"):
        read_pruned(training_run.dense, tmp_path / "nowhere")
