"""A head that predicts further tokens stays as it is, and llama.cpp's answers stay the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting.gguf import export, list_linears, measure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tensor_coverage import check_known_tensors
from racdeploy.pruning.walk.assemble import CutShape, assemble
from tests.support.mtp_head import add_further_head
from tests.support.tiny_models import FAMILIES, edit_json, make_checkpoint

pytestmark = pytest.mark.skipif(
    "qwen3_5_text" not in FAMILIES, reason="needs Qwen3.5, of transformers 5.2"
)
IDS = list(range(5, 29))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 with a head."""
    root = tmp_path_factory.mktemp("further")
    make_checkpoint(root / "model", "qwen3_5_text", dtype="float32")
    return add_further_head(root / "model", like=3)


def _with_another_head(folder: Path, out: Path) -> Path:
    """Write the model with another head, in a file of its own."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    head = {name: value + 1 for name, value in tensors.items() if name.startswith("mtp.")}
    rest = {name: value for name, value in tensors.items() if name not in head}
    (out / "model.safetensors").unlink()
    files = {"model-00001.safetensors": rest, "model-00002.safetensors": head}
    for name, part in files.items():
        save_file(part, out / name, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    listed = {file.name for file in Checkpoint(out).files()}
    assert files.keys() <= listed, "a stage that is done must know of the head"
    return out


def _logits(file: Path) -> NDArray[np.float32]:
    settings = EngineSettings(context_tokens=64, parallel=1, threads=1, cache_dtype="f32")
    with open_engine("llamacpp", file, settings) as engine:
        return engine.logits(IDS)


def test_it_is_written_behind_the_blocks_and_changes_no_logits(
    folder: Path, tmp_path: Path
) -> None:
    """Llama.cpp counts its block, and computes the model as if it were not there."""
    with_head = Checkpoint(folder)
    check_known_tensors(with_head)
    assert len(with_head.mtp_entries) == 15
    assert "stay as they are" in with_head.notes[0]
    assert with_head.sha256 != Checkpoint(_with_another_head(folder, tmp_path / "other")).sha256

    drafting = export(with_head, tmp_path / "drafting.gguf", quant="f32").path
    reader = gguf.GGUFReader(drafting)
    assert reader.fields["qwen35.block_count"].contents() == 5
    assert reader.fields["qwen35.nextn_predict_layers"].contents() == 1
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight", "blk.4.ffn_up.weight"} <= names

    plain = tmp_path / "plain"
    make_checkpoint(plain, "qwen3_5_text", dtype="float32")
    without = export(Checkpoint(plain), tmp_path / "plain.gguf", quant="f32").path
    assert np.array_equal(_logits(drafting), _logits(without))


def test_it_goes_into_a_pruned_folder_as_it_is(folder: Path, tmp_path: Path) -> None:
    """And behind fewer blocks, where some are cut."""
    (tmp_path / "blocks").mkdir()
    dense = Checkpoint(folder)
    fewer = CutShape((1, 2, 3), dense.shape.sizes[1:])

    for shape, last in ((None, "blk.4."), (fewer, "blk.3.")):
        sparse = Checkpoint(assemble(dense, tmp_path / "blocks", tmp_path / last, shape))
        assert sparse.mtp_entries.keys() == dense.mtp_entries.keys()
        for name in dense.mtp_entries:
            assert np.array_equal(sparse.read(name), dense.read(name)), name

        file = export(sparse, tmp_path / f"{last}gguf", quant="f32").path
        drafting = [
            tensor.name for tensor in gguf.GGUFReader(file).tensors if "nextn" in tensor.name
        ]
        assert drafting
        assert all(name.startswith(last) for name in drafting)


@pytest.mark.parametrize("damage", ["narrower", "incomplete", "unknown"])
def test_one_that_does_not_fit_is_left_out(folder: Path, tmp_path: Path, damage: str) -> None:
    """Llama.cpp takes one width for all blocks, and every tensor or none."""
    tensors = load_file(folder / "model.safetensors")
    if damage == "narrower":
        name = "mtp.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-8].contiguous()
    if damage == "incomplete":
        del tensors["mtp.norm.weight"]
    if damage == "unknown":
        tensors["mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()

    make_checkpoint(tmp_path / "model", "qwen3_5_text")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "model" / "config.json", mtp_num_hidden_layers=1)

    checkpoint = Checkpoint(tmp_path / "model")
    assert not checkpoint.mtp_entries
    assert "multi-token prediction" in checkpoint.notes[0]
    file = export(checkpoint, tmp_path / "model.gguf", quant="f32").path
    assert not any("nextn" in tensor.name for tensor in gguf.GGUFReader(file).tensors)


def test_the_head_has_no_linears_that_pruning_changes(folder: Path, tmp_path: Path) -> None:
    """Else a bundle's verification would miss zeros in the head, which keeps all its weights."""
    checkpoint = Checkpoint(folder)
    result = export(checkpoint, tmp_path / "model.gguf", quant="q8_0")
    linears = list_linears(checkpoint.family, *measure(result.path))
    prunable = checkpoint.shape.prunable_weights
    assert linears == {tensor.name for tensor in result.tensors if tensor.source in prunable}
    head = [tensor.name for tensor in result.tensors if tensor.source.startswith("mtp.layers.")]
    assert head
    assert not linears & {*head}
