"""What ``racdeploy inspect`` says of a cut model, in every form that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from racdeploy.bundles.inspect import inspect_path
from racdeploy.exporting import load, write
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Export
from tests.support.cut_models import Cut, cut_checkpoint
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

DIFFERENT: Cut = [(4, 64), (4, 64), (2, 96)]
SHOWN = ("feed_forward_channels", "query_heads", "query_columns", "key_value_heads")


def inspect_widths(path: Path) -> Mapping[str, object]:
    summary = inspect_path(path).summary
    return {key: summary[key] for key in SHOWN if key in summary}


def make_cut(folder: Path, family: str, cut: Cut) -> Checkpoint:
    whole = make_checkpoint(folder.with_name("whole"), family, num_hidden_layers=3)
    return Checkpoint(cut_checkpoint(whole, folder, cut))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_widths_of_each_block_are_shown(tmp_path: Path, family: str) -> None:
    """Equal neighbours are counted; the folder, the file and the container say the same."""
    checkpoint = make_cut(tmp_path / "cut", family, DIFFERENT)
    expected = {"feed_forward_channels": "64 × 2, 96", "query_heads": "4 × 2, 2"}
    plain = write(checkpoint, tmp_path / "cut.gguf", Export(quant="q8_0")).path
    packed = write(
        checkpoint, tmp_path / "cut.racgguf", Export(quant="q8_0", packing="bitmask")
    ).path

    assert inspect_widths(checkpoint.folder) == expected | {"key_value_heads": "2 × 3"}
    assert inspect_widths(plain) == expected
    assert inspect_widths(packed) == expected


@pytest.mark.slow
def test_a_graph_shows_columns_of_queries(tmp_path: Path) -> None:
    """A graph does not say how wide a head is."""
    checkpoint = make_cut(tmp_path / "cut", "llama", [(2, 64)] * 3)
    out = tmp_path / load("onnx").artifact_path("cut", "f32", "plain").name
    graph = write(checkpoint, out, Export(format="onnx", quant="f32", exporter="genai")).path
    assert inspect_widths(graph) == {
        "feed_forward_channels": "64 × 3",
        "query_columns": "32 × 3",
    }


def test_files_of_other_things_have_no_widths(tmp_path: Path) -> None:
    """Experts have a width each, which their tensors show; how many there are is said."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe"))
    file = write(checkpoint, tmp_path / "model.gguf", Export(quant="q8_0")).path
    assert inspect_widths(file) == {"query_heads": "4 × 2"}
    assert inspect_path(file).summary["experts"] == "4 × 2"
    assert inspect_path(checkpoint.folder).summary["experts"] == 4


def test_weights_without_a_config_are_shown(tmp_path: Path) -> None:
    """A safetensors file alone has the tensors and zeros of its folder, to the last number."""
    checkpoint = make_cut(tmp_path / "cut", "llama", DIFFERENT)
    found = inspect_path(checkpoint.folder / "model.safetensors")
    whole = inspect_path(checkpoint.folder)

    assert found.tensors == whole.tensors
    assert found.summary["zeros_of_all_weights"] == whole.summary["zeros_of_all_weights"]
    assert found.summary["feed_forward_channels"] == "64 × 2, 96"
    assert found.summary["query_columns"] == "64 × 2, 32"


def test_no_weights_are_named(tmp_path: Path) -> None:
    """A download that stopped is called that."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * 20)
    with raises("damaged-safetensors", "model.safetensors"):
        inspect_path(file)
