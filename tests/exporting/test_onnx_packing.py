"""Zeros left out of ONNX files: smaller, the same answers, and folded by a real session."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.torch import load_file, save_file

from racdeploy.engines.backends.onnxruntime import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import check
from racdeploy.exporting.onnx import export, measure
from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph
from racdeploy.exporting.onnx.graph import strip_weights
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.folding import check_folding
from racdeploy.packing.packers import bitmask_graph
from racdeploy.recipe import Export
from tests.support.errors import raises
from tests.support.tiny_onnx import APPENDING, tiny_onnx

QUANTS = ("f32", "f16", "matmulnbits_8")
IDS = tuple(range(3, 40))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with the smaller half of every linear set to zero."""
    folder = tmp_path_factory.mktemp("packing") / "model"
    shutil.copytree(tiny_onnx() / "checkpoint", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj.weight" in name:
            weight[weight.abs() < weight.abs().float().median()] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export here takes one graph of the tiny model, whose weights it replaces."""
    dense = Checkpoint(tiny_onnx() / "checkpoint")
    file = tiny_onnx() / APPENDING / "model.onnx"
    graph = strip_weights(file, dense)
    monkeypatch.setattr(
        onnx_writer,
        "export_verified_graph",
        lambda checkpoint, exporter: VerifiedGraph(graph, "built once"),
    )


def logits_of(file: Path) -> np.ndarray:
    engine = open_engine(file, EngineSettings(64, parallel=1, threads=1, cache_dtype="f32"))
    try:
        return engine.logits(IDS)
    finally:
        engine.close()


@pytest.mark.parametrize("quant", QUANTS)
def test_packed_files_are_small_and_answer_alike(
    sparse: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """Equal logits bit for bit, zeros and sizes as measured in the file."""
    plain = export(sparse, tmp_path / "plain.onnx", quant=quant)
    expected_TV = logits_of(plain.path)
    packed = export(sparse, tmp_path / "packed.onnx", quant=quant, packing="bitmask_graph")
    np.testing.assert_array_equal(expected_TV, logits_of(packed.path))
    assert packed.size_bytes == packed.path.stat().st_size

    sizes = [sum(t.size_bytes for t in r.tensors if "_proj" in t.name) for r in (packed, plain)]
    codes, scales = {"f32": (32, 0.0), "f16": (16, 0.0), "matmulnbits_8": (8, 1.0)}[quant]
    ideal = (codes / 2 + 1 + scales) / (codes + scales)
    assert sizes[0] / sizes[1] < ideal + 0.02  # the element in front of the values

    rows = {row.name: row for row in measure(packed.path)[1]}
    for before, tensor in zip(plain.tensors, packed.tensors, strict=True):
        row = rows[tensor.name]
        assert (before.zeros, tensor.zeros) == (tensor.zeros, row.zeros)
        assert (tensor.packing, tensor.size_bytes) == (row.packing, row.size_bytes)
        assert bool(tensor.packing_reason) == (tensor.packing == "plain")
    assert {t.packing for t in packed.tensors if "_proj" in t.name} == {"bitmask_graph"}


def test_half_precision_meets_the_bar(sparse: Checkpoint, tmp_path: Path) -> None:
    """At 50 % zeros the linears take at most 0.60 of the dense file's in half precision."""
    result = export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")
    linears = [tensor for tensor in result.tensors if "_proj" in tensor.name]
    assert sum(t.size_bytes for t in linears) <= 0.60 * sum(2 * np.prod(t.shape) for t in linears)


@pytest.mark.parametrize("quant", QUANTS)
def test_folding_is_proved_by_looking(sparse: Checkpoint, tmp_path: Path, quant: str) -> None:
    """A graph whose mask is an input is not folded, and one whose mask was changed folds into other
    weights.
    """
    export(sparse, tmp_path / "m.onnx", quant=quant, packing="bitmask_graph")
    packer = bitmask_graph.GraphPacker(onnx.ModelProto(), tmp_path / "m.onnx")
    name = "model.layers.0.mlp.up_proj.weight"
    model = onnx.load(str(tmp_path / "m.onnx"))
    (mask,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{name}.mask")
    final = f"{name}.f32" if quant == "f16" else name
    packer.expected_sha256[final] = "0" * 64
    with raises("packed-weights-differ", repr(final)):
        check_folding(tmp_path / "m.onnx", packer.expected_sha256)
    model.graph.initializer.remove(mask)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(mask.name, onnx.TensorProto.UINT8, mask.dims)
    )
    onnx.save(model, str(tmp_path / "open.onnx"))
    with raises("not-folded"):
        check_folding(tmp_path / "open.onnx", {})


def test_plain_onnxruntime_reads_the_graph(sparse: Checkpoint, tmp_path: Path) -> None:
    """Any onnxruntime loads it, and it is one file."""
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_large_model_is_refused_with_its_price(
    sparse: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how much memory a load would pass, and what to use."""
    monkeypatch.setattr(bitmask_graph, "MAX_WEIGHTS", 100_000)
    with raises("too-large-for-packing", " GB ", "'plain'"):
        export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")


def test_a_rival_in_another_format_may_be_asked_for() -> None:
    """A build sets single tensors' formats back for it: set, and of no use, are two things."""
    plain = Export(format="onnx", quant="matmulnbits_8").model_copy(
        update={"quant": "k_quant", "tensors": {}}
    )
    check(plain)
    with raises("unused-setting", "export.tensors"):
        check(plain.model_copy(update={"tensors": {"ffn_down": "f16"}}))


def test_an_older_second_graph_does_not_stay_beside_a_new_graph(
    sparse: Checkpoint, tmp_path: Path
) -> None:
    """The operator would run its weights; whoever exports now may not have racdeploy-kernels."""
    stale = [tmp_path / "m.accel.onnx", tmp_path / "m.accel.onnx_data", tmp_path / "m.onnx_data"]
    for file in stale:
        file.write_bytes(b"of another model")
    result = export(sparse, tmp_path / "m.onnx", quant="f16")
    assert list(result.files) == ["m.onnx"]
    assert not any(file.exists() for file in stale)
