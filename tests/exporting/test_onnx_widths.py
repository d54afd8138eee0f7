"""Cut models as ONNX: blocks left out, blocks of different widths, all in one graph that is proven.

The model has two of three blocks left. Neither is the widest in everything, one has half of the
query heads, and the channels of the other do not divide into quant blocks.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy import quant as quants
from racdeploy.engines.backends.onnxruntime import open_engine
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import onnx as onnx_format
from racdeploy.exporting.onnx import export, exporter_choice, measure
from racdeploy.exporting.onnx import exporters as onnx_exporters
from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph, export_verified_graph
from racdeploy.exporting.onnx.padding import find_unsupported_widths, write_padded_model
from racdeploy.manifest import Manifest
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from tests.support.cut_models import cut_checkpoint
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_artifacts import write_bundle
from tests.support.tiny_models import (
    CUT_FAMILIES,
    edit_json,
    make_checkpoint,
)
from tests.support.tiny_onnx import needs_optimum

HEADS, CHANNELS = (4, 2), (48, 64)
CUT = tuple(zip(HEADS, CHANNELS, strict=True))
SAME = ((2, 64), (2, 64))
IDS = np.random.default_rng(1).integers(0, 480, 24)
genai: Any = onnx_exporters.load("genai")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The cut model, with half of each linear zero."""
    folder = tmp_path_factory.mktemp("widths")
    dense = make_checkpoint(folder / "dense", "qwen3", num_hidden_layers=3)
    tensors = load_file(dense / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj.weight" in name:
            weight[weight.abs() < weight.abs().float().median()] = 0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(cut_checkpoint(dense, folder / "checkpoint", CUT, blocks=(0, 2)))


@pytest.fixture(scope="module")
def wide(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the builder's graph of the padded model."""
    folder = tmp_path_factory.mktemp("wide")
    kept = folder / "kept"
    run_builder = genai._run_builder

    def build_and_keep(prepared: Path, out: Path) -> Path:
        graph = run_builder(prepared, out)
        shutil.copytree(out, kept)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai, "_run_builder", build_and_keep)
        genai.build(onnx_exporters.prepare(checkpoint, folder / "in"), folder / "out")
    assert [file.name for file in folder.iterdir() if "padded" in file.name] == []
    return kept


def copy_graph(wide: Path, prepared: Path, out: Path) -> Path:
    shutil.copytree(wide, out)
    return out / "model.onnx"


@pytest.fixture
def _built_once(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genai, "_run_builder", partial(copy_graph, wide))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint, wide: Path) -> VerifiedGraph:
    """The graph with own widths, as chosen by its weights and logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai, "_run_builder", partial(copy_graph, wide))
        return export_verified_graph(checkpoint, "genai")


@pytest.fixture
def _chosen(found: VerifiedGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: found)


def run_torch(checkpoint: Checkpoint, weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Return logits_TV, with some other weights."""
    model = load_model(checkpoint)
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            model.get_parameter(name).copy_(torch.from_numpy(weight))
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def run_graph(file: Path | bytes, checkpoint: Checkpoint) -> np.ndarray:
    """Return logits_TV of one pass on plain onnxruntime."""
    session = onnxruntime.InferenceSession(file if isinstance(file, bytes) else str(file))
    cache = np.zeros(
        (1, checkpoint.shape.num_key_value_heads, 0, checkpoint.shape.head_dim), np.float32
    )
    offered = {"input_ids": IDS[None], "attention_mask": np.ones((1, IDS.size), np.int64)}
    feeds = {value.name: offered.get(value.name, cache) for value in session.get_inputs()}
    return session.run(["logits"], feeds)[0][0]


def relative(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected - found).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_the_padded_twin_computes_what_the_model_computes(tmp_path: Path, family: str) -> None:
    """Under torch, to rounding: zeros change only how sums are split up.

    Zeros at the end of all heads, and not of each group, would give heads to other keys.
    """
    blocks = (0, 1)
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", family))
    model = Checkpoint(cut_checkpoint(dense.folder, tmp_path / "cut", CUT, blocks))
    twin = Checkpoint(write_padded_model(model, tmp_path / "twin"))
    assert twin.shape.is_uniform
    assert {(sizes["H"], sizes["F"]) for sizes in twin.shape.sizes} == {(4, 64)}
    assert relative(run_torch(model), run_torch(twin)) < exporter_choice.PARITY_TOLERANCE
    assert relative(run_torch(model), run_torch(dense)) > 100 * exporter_choice.PARITY_TOLERANCE


def test_the_graph_has_the_widths_of_each_block_and_nothing_else(
    found: VerifiedGraph, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight, every attention node; proven in prefill and in cached decode."""
    assert found.note.startswith("ONNX graph by genai, from torch by")
    nodes = [node for node in found.graph.model.graph.node if node.op_type == "GroupQueryAttention"]
    heads = [{a.name: a.i for a in node.attribute}["num_heads"] for node in nodes]
    assert tuple(heads) == HEADS
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: found)
    export(checkpoint, tmp_path / "m.onnx", quant="f32")
    shapes = {row.name: row.shape for row in measure(tmp_path / "m.onnx")[1]}
    expected = {name: entry.shape for name, entry in checkpoint.entries.items()}
    assert {name: shapes[name] for name in expected} == expected
    assert relative(run_torch(checkpoint), run_graph(tmp_path / "m.onnx", checkpoint)) < 1e-4


@pytest.mark.usefixtures("_built_once")
def test_a_wrong_number_of_heads_fails_the_comparison(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin's attention over the model's own weights does not run, and is not chosen."""
    monkeypatch.setattr(genai, "_fit_attention", lambda graph, checkpoint: None)
    with raises("no-onnx-exporter", "genai: the comparison with torch"):
        export_verified_graph(checkpoint, "genai")


@pytest.mark.usefixtures("_built_once")
def test_other_heads_of_the_same_number_are_noticed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are compared value by value, so padding that is taken for a head is found."""
    find_own = genai.find_axis_indices

    def take_last(checkpoint: Checkpoint, name: str) -> Any:
        own = find_own(checkpoint, name)
        if name != "model.layers.1.self_attn.q_proj.weight":
            return own
        return own[0] + checkpoint.shape.head_dim, *own[1:]

    monkeypatch.setattr(genai, "find_axis_indices", take_last)
    with raises("no-onnx-exporter", "'model.layers.1.self_attn.q_proj.weight'"):
        export_verified_graph(checkpoint, "genai")


@pytest.mark.parametrize("quant", ["f16", "matmulnbits_8", "matmulnbits_4", "k_quant"])
@pytest.mark.usefixtures("_chosen")
def test_the_file_computes_what_its_weights_say(
    checkpoint: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """In float32, which a kernel uses without ``accuracy_level``; within float32's rounding."""
    result = export(checkpoint, tmp_path / "m.onnx", quant=quant)
    stored = {}
    for tensor in result.tensors:
        if len(tensor.shape) == 2:
            real = quants.load(tensor.actual_quant)
            packed = real.quantize(checkpoint.read(tensor.name))
            stored[tensor.name] = real.dequantize(packed, tensor.shape[1])
    exact = onnx.load(str(tmp_path / "m.onnx"))
    for node in exact.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    expected_TV = run_torch(checkpoint, stored)
    assert relative(expected_TV, run_graph(exact.SerializeToString(), checkpoint)) < 1e-4


@pytest.mark.usefixtures("_chosen")
def test_a_width_that_no_quant_block_divides_has_a_reason(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Only the linear that has such rows: the other block's of the same name is stored as asked."""
    result = export(checkpoint, tmp_path / "m.onnx", quant="matmulnbits_8")
    rows = {
        t.name: (t.actual_quant, t.reason)
        for t in result.tensors
        if t.name.endswith("down_proj.weight")
    }
    assert rows == {
        "model.layers.0.mlp.down_proj.weight": (
            "f16",
            "rows of 48 weights do not divide into quant blocks of 32",
        ),
        "model.layers.1.mlp.down_proj.weight": ("matmulnbits_8", ""),
    }


@pytest.mark.usefixtures("_chosen")
def test_zeros_are_left_out_of_blocks_of_any_width(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Packed bytes are fewer, the answers the same."""
    (tmp_path / "plain").mkdir()
    export(checkpoint, tmp_path / "plain" / "m.onnx", quant="matmulnbits_8")
    packing = "bitmask_graph"
    packed = export(checkpoint, tmp_path / "m.onnx", quant="matmulnbits_8", packing=packing)
    taken = {t.name for t in packed.tensors if t.packing == packing}
    assert {name for name in taken if ".layers.1.mlp." in name}

    settings = EngineSettings(64, parallel=1, threads=1, cache_dtype="f32")
    logits = []
    for file in (tmp_path / "plain" / "m.onnx", tmp_path / "m.onnx"):
        engine = open_engine(file, settings)
        logits.append(engine.logits(tuple(map(int, IDS))))
        engine.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": [2, 1]}, "its blocks differ in key and value heads"),
        ({"num_attention_heads": [4, 3]}, "block 1 has 3 query heads for 2 groups"),
    ],
)
def test_heads_that_break_the_groups_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, list[int]], reason: str
) -> None:
    """Before the builder runs."""
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "model"))
    edit_json(folder / "config.json", **{widths.KEY: checkpoint.config[widths.KEY] | changes})
    assert (
        find_unsupported_widths(Checkpoint(folder).shape)
        == genai.unsupported_reason(Checkpoint(folder))
        == reason
    )
    assert genai.unsupported_reason(checkpoint) == ""


def test_experts_keep_one_width_for_all_blocks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Which is said before any work; blocks and the vocabulary are cut in any model."""
    experts = Checkpoint(make_checkpoint(tmp_path / "experts", "qwen3_moe"))
    assert "experts" in onnx_format.unsupported_reason(experts, ("Q", "L"), uniform=False)
    assert onnx_format.unsupported_reason(experts, ("Q", "L"), uniform=True) == ""
    assert onnx_format.unsupported_reason(experts, ("L", "V"), uniform=False) == ""
    assert onnx_format.unsupported_reason(checkpoint, ("F", "Q"), uniform=False) == ""


@pytest.mark.usefixtures("_chosen")
def test_room_for_the_twin_is_asked_for(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bytes of each of its weights, which are more than the model's own."""
    weights = sum(np.prod(entry.shape) for entry in checkpoint.entries.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8 * weights))
    with raises("disk-full", "TMPDIR"):
        export(checkpoint, tmp_path / "m.onnx", quant="f16")


def test_other_programs_are_given_the_cut_model(
    found: VerifiedGraph, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of blocks and heads, and the size of a head, which no longer follows from them.

    Where it does not, optimum cannot open the graph, and the result says so.
    """
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: found)
    result = export(checkpoint, tmp_path / "model.onnx", quant="f32")
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "checkpoint"))
    bundle = write_bundle(folder, {"onnx/model.onnx": result.path}, "onnxruntime")
    texts = onnx_format.companions(Manifest.read(bundle), checkpoint, bundle)
    config = json.loads(texts["config.json"])
    decoder = json.loads(texts["genai_config.json"])["model"]["decoder"]
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (2, 4)
    assert (config["head_dim"], config["num_key_value_heads"]) == (32, 2)
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"]) == (2, 4)
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (32, 2)
    assert any(note.startswith("optimum's ORTModelForCausalLM") for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [SAME, CUT], ids=["uniform", "per block"])
@pytest.mark.parametrize(
    "exporter", ["genai", pytest.param("optimum", marks=needs_optimum), "torch"]
)
@pytest.mark.parametrize("family", some(CUT_FAMILIES))
def test_every_family_passes_parity_or_says_why(
    tmp_path: Path, family: str, exporter: str, cut: tuple[tuple[int, int], ...]
) -> None:
    """With blocks left out, tied or not, as the whole model does."""
    dense = make_checkpoint(tmp_path / "dense", family, tied=family != "llama", num_hidden_layers=4)
    checkpoint = Checkpoint(cut_checkpoint(dense, tmp_path / "cut", cut, blocks=(1, 3)))
    refused = {
        ("genai", "smollm3"): "onnxruntime-genai's model builder",
        ("genai", "gemma3_text"): "genai: Gemma3ForCausalLM",
        ("genai", "ministral3"): "genai: Ministral3ForCausalLM",
        ("genai", "olmo3"): "genai: Olmo3ForCausalLM",
        ("genai", "phi3"): "genai: Phi3ForCausalLM",
        ("optimum", "gemma3_text"): "'model.embed_tokens.weight'",
    }
    if value := refused.get((exporter, family)):
        with raises("no-onnx-exporter", f"{exporter}: ", value):
            export_verified_graph(checkpoint, exporter)
        return
    assert f"by {exporter}" in export_verified_graph(checkpoint, exporter).note
