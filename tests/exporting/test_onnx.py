"""ONNX export: graphs that compute what torch computes, with the checkpoint's weights."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.onnx import export, exporter_choice, list_linears, measure
from racdeploy.exporting.onnx import exporters as onnx_exporters
from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph, export_verified_graph
from racdeploy.exporting.onnx.graph import strip_weights
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx import file as onnx_file
from racdeploy.pipeline.onnx_sizes import count_bytes, estimate_graph_bytes, plan_graph
from tests.support.errors import raises
from tests.support.tiny_models import FAMILIES, make_checkpoint, turn_decay_rates
from tests.support.tiny_onnx import APPENDING, TRACES_STATES, needs_optimum

QUANTS = ("f32", "f16", "matmulnbits_8", "matmulnbits_4", "k_quant")
IDS = np.random.default_rng(1).integers(0, 480, 40)[None]
PRUNED = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tied model with half of one linear zero.

    Its MLP width divides into blocks, as its hidden size does.
    """
    folder = make_checkpoint(tmp_path_factory.mktemp("onnx") / "model", "qwen3")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[PRUNED][:, ::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def built(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's float32 graph."""
    folder = tmp_path_factory.mktemp("built")
    genai = onnx_exporters.load("genai")
    return genai.build(onnx_exporters.prepare(checkpoint, folder / "in"), folder / "out")


@pytest.fixture
def chosen(checkpoint: Checkpoint, built: Path, monkeypatch: pytest.MonkeyPatch) -> VerifiedGraph:
    """The same graph for every export of this file."""
    found = VerifiedGraph(strip_weights(built, checkpoint), "built once")
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: found)
    return found


def run_graph(file: Path | bytes, checkpoint: Checkpoint, *, optimized: bool = True) -> np.ndarray:
    """Return logits_TV of one pass on plain onnxruntime, with default optimizations or none."""
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file if isinstance(file, bytes) else str(file), options)
    cache = np.zeros(
        (1, checkpoint.shape.num_key_value_heads, 0, checkpoint.shape.head_dim), np.float32
    )
    offered = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.arange(IDS.size)[None],
    }
    feeds = {value.name: offered.get(value.name, cache) for value in session.get_inputs()}
    return session.run(["logits"], feeds)[0][0]


def run_torch(
    checkpoint: Checkpoint, replace: Callable[[str, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return logits_TV of the checkpoint under torch, with other weights."""
    model = load_model(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(replace(name, parameter.numpy())))
        return model(torch.from_numpy(IDS)).logits[0].numpy()


def relative(expected: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(expected - found).max() / np.abs(expected).max())


@pytest.mark.parametrize("quant", ["f32", "f16", "k_quant", "matmulnbits_4"])
@pytest.mark.usefixtures("chosen")
def test_the_bytes_of_its_weights_are_known_before(
    checkpoint: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """Tensor by tensor; nodes and names, a large part of so small a file, about."""
    result = export(checkpoint, tmp_path / "m.onnx", quant=quant)
    plan = plan_graph(checkpoint, quant)
    written = {each.name: each for each in result.tensors}
    assert written.keys() == {tensor.name for tensor in plan}
    for tensor in plan:
        each = written[tensor.name]
        assert tensor.quant == each.actual_quant
        # Zero points of a row are whole bytes.
        assert 0 <= each.size_bytes - count_bytes(tensor) < math.prod(tensor.shape[:-1])
    assert estimate_graph_bytes(checkpoint, plan) == pytest.approx(result.size_bytes, rel=0.02)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.usefixtures("chosen")
def test_the_file_computes_what_its_weights_say(
    checkpoint: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """The file on onnxruntime equals torch on the dequantized weights, within float32's rounding.

    accuracy_level 4 lets the kernel round activations; without the attribute it computes in
    float32.
    """
    result = export(checkpoint, tmp_path / "m.onnx", quant=quant)
    real = {tensor.name: quants.load(tensor.actual_quant) for tensor in result.tensors}

    def stored(name: str, weight: np.ndarray) -> np.ndarray:
        if weight.ndim == 1:
            return weight
        return real[name].dequantize(real[name].quantize(weight), weight.shape[1])

    exact = onnx.load(str(tmp_path / "m.onnx"))
    for node in exact.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    expected_TV = run_torch(checkpoint, stored)
    assert relative(expected_TV, run_graph(exact.SerializeToString(), checkpoint)) < 1e-4
    assert relative(expected_TV, run_graph(tmp_path / "m.onnx", checkpoint)) < (
        0.05 if quant not in QUANTS[:2] else 1e-4
    )


@pytest.mark.parametrize(
    ("quant", "packing"),
    [*((quant, "plain") for quant in QUANTS), *((quant, "bitmask_graph") for quant in QUANTS[:3])],
)
@pytest.mark.usefixtures("chosen")
def test_the_file_computes_the_same_without_optimizations(
    checkpoint: Checkpoint, tmp_path: Path, quant: str, packing: str
) -> None:
    """No scale waits for a Cast to be folded, which onnxruntime 1.32 gets wrong.

    Blocks round activations or not.
    """
    export(checkpoint, tmp_path / "m.onnx", quant=quant, packing=packing)
    folded_TV, unfolded_TV = (
        run_graph(tmp_path / "m.onnx", checkpoint, optimized=o) for o in (True, False)
    )
    assert relative(folded_TV, unfolded_TV) < (0.05 if quant not in QUANTS[:2] else 1e-4)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.usefixtures("chosen")
def test_the_result_describes_the_file(checkpoint: Checkpoint, tmp_path: Path, quant: str) -> None:
    """Sizes, hashes, real formats and zeros are those in the file.

    What differs from the asked has a reason.
    """
    seen: list[tuple[int, int]] = []
    out = tmp_path / "m.onnx"
    result = export(
        checkpoint, out, quant=quant, progress=lambda done, total: seen.append((done, total))
    )
    assert (result.size_bytes, dict(result.files)) == (
        out.stat().st_size,
        {"m.onnx": file_sha256(out)},
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert all(bool(t.reason) == (t.actual_quant != t.requested_quant) for t in result.tensors)
    rows = {row.name: row for row in measure(out)[1]}
    for tensor in result.tensors:
        row = rows[tensor.name]
        assert (tensor.actual_quant, tensor.shape) == (row.type, row.shape)
        assert (tensor.zeros, tensor.size_bytes) == (row.zeros, row.size_bytes)
    assert {t.source for t in result.tensors} == set(checkpoint.entries)
    (pruned,) = (tensor for tensor in result.tensors if tensor.source == PRUNED)
    assert pruned.zeros >= 0.5
    linears = list_linears(checkpoint.family, *measure(out))
    prunable = checkpoint.shape.prunable_weights
    assert linears == {tensor.name for tensor in result.tensors if tensor.source in prunable}
    assert len(linears) == 7 * checkpoint.shape.block_count
    embedding = rows["model.embed_tokens.weight"]
    assert embedding.type == (quant if quant in ("f32", "f16") else "matmulnbits_8")


@pytest.mark.usefixtures("chosen")
def test_rows_that_are_no_blocks_stay_in_half_precision(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    """The down_proj of this model has rows of 96: three blocks, which k_quant wants in pairs."""
    result = export(checkpoint, tmp_path / "m.onnx", quant="k_quant")
    other = {
        t.name.split(".")[-2]: (t.actual_quant, t.reason)
        for t in result.tensors
        if "do not divide" in t.reason
    }
    assert other == {
        "down_proj": ("f16", "rows of 96 weights do not divide into quant blocks of 64")
    }


@pytest.mark.usefixtures("chosen")
def test_many_weights_go_to_a_real_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit they lie beside the graph under the name of transformers.js.

    A smaller export removes them.
    """
    whole = export(checkpoint, tmp_path / "m.onnx", quant="f16")
    expected_TV = run_graph(tmp_path / "m.onnx", checkpoint)
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", 1000)
    result = export(checkpoint, tmp_path / "m.onnx", quant="f16")
    files = {file.name: file_sha256(file) for file in tmp_path.iterdir()}
    assert dict(result.files) == files
    assert sorted(files) == ["m.onnx", "m.onnx_data"]
    assert not (tmp_path / "m.onnx_data").is_symlink()
    assert result.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    np.testing.assert_array_equal(expected_TV, run_graph(tmp_path / "m.onnx", checkpoint))
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", whole.size_bytes)
    assert export(checkpoint, tmp_path / "m.onnx", quant="f16").files == whole.files
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def _spoil(built: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Copy a graph with its weights inside, changed."""
    model = onnx.load(str(built))
    change(model)
    folder.mkdir(exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    return folder / "model.onnx"


def _set(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))


def _nudge(values: np.ndarray) -> np.ndarray:
    values.flat[7] = np.nextafter(values.flat[7], np.float32(np.inf))
    return values


def _swap(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.name.endswith(("layers.0/mlp/gate_proj/MatMul", "layers.0/mlp/up_proj/MatMul")):
            (other,) = {"gate_proj", "up_proj"} - {node.name.split("/")[-2]}
            node.input[1] = f"model.layers.0.mlp.{other}.MatMul.weight"


def _turn(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    node.op_type = "Relu"


SPOILED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "one value": (
        lambda m: _set(m, "model.layers.1.attn.o_proj.MatMul.weight", _nudge),
        "'model.layers.1.attn.o_proj.MatMul.weight'",
    ),
    "a norm": (
        lambda m: _set(m, "model.layers.2.final_norm_layernorm.weight", _nudge),
        "'model.norm.weight'",
    ),
    "another shape": (
        lambda m: _set(m, "model.layers.0.attn.k_proj.MatMul.weight", lambda w: w[:, :8]),
        "'model.layers.0.self_attn.k_proj.weight'",
    ),
    "half precision": (
        lambda m: _set(
            m, "model.layers.0.attn.k_proj.MatMul.weight", lambda w: w.astype(np.float16)
        ),
        "'model.layers.0.self_attn.k_proj.weight'",
    ),
    "a fused tensor": (
        lambda m: m.graph.initializer.append(
            numpy_helper.from_array(
                np.ones((64, 256), np.float32), "model.layers.0.attn.qkv_proj.MatMul.weight"
            )
        ),
        "'model.layers.0.attn.qkv_proj.MatMul.weight' of 16384 values",
    ),
    "a lost node": (
        lambda m: m.graph.node.remove(
            next(n for n in m.graph.node if n.name.endswith("layers.0/mlp/up_proj/MatMul"))
        ),
        "'model.layers.0.mlp.up_proj.weight'",
    ),
    "another operator": (_turn, "Relu"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_graph_that_differs_from_the_checkpoint_is_refused(
    checkpoint: Checkpoint, built: Path, tmp_path: Path, name: str
) -> None:
    """An exporter's exit code proves nothing: every tensor and its use is compared."""
    change, value = SPOILED[name]
    file = _spoil(built, tmp_path / "spoiled", change)
    with raises("graph-differs", value):
        strip_weights(file, checkpoint)


def test_a_wrong_graph_of_right_weights_fails_parity_and_the_other_exporter_is_taken(
    checkpoint: Checkpoint, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two linears of one shape change places: every value is right, the logits are not.

    The note says so. The other exporter's graph is the right one, which it has not made itself.
    """
    swapped = _spoil(built, tmp_path / "spoiled", _swap)
    monkeypatch.setattr(onnx_exporters.load("genai"), "build", lambda prepared, out: swapped)
    monkeypatch.setattr(onnx_exporters.load(APPENDING), "build", lambda prepared, out: built)
    chosen = export_verified_graph(checkpoint, "auto")
    assert chosen.note.startswith(f"ONNX graph by {APPENDING}")
    reason = chosen.note.partition("; not by ")[2].partition("; ")[0]
    assert reason.startswith("genai: its logits differ from torch's")
    assert len(chosen.graph.linears) == 7 * checkpoint.shape.block_count + 1
    for name in ("optimum", "torch"):
        exporter = onnx_exporters.load(name)
        monkeypatch.setattr(exporter, "unsupported_reason", lambda checkpoint: "it is not asked")
    with raises("no-onnx-exporter", f"{reason}; optimum: it is not asked"):
        export_verified_graph(checkpoint, "auto")


@pytest.mark.parametrize(
    ("preference", "order"),
    [(2, "genai: no; optimum: no; torch: no"), (0, "optimum: no; genai: no; torch: no")],
)
def test_auto_asks_the_exporters_by_their_preference(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, preference: int, order: str
) -> None:
    """The smallest number first; the order is in the exporters' files and in no list."""
    for name in ("genai", "optimum", "torch"):
        monkeypatch.setattr(
            onnx_exporters.load(name), "unsupported_reason", lambda checkpoint: "no"
        )
    monkeypatch.setattr(onnx_exporters.load("optimum"), "PREFERENCE", preference)
    with raises("no-onnx-exporter", order):
        export_verified_graph(checkpoint, "auto")


def test_a_dead_child_is_reported_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal and an exit code are named.

    A builder that ends well without a graph is an error too.
    """
    (tmp_path / "dying.py").write_text(
        "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    (tmp_path / "failing.py").write_text("raise SystemExit('no such layer')\n")
    (tmp_path / "idle.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    model = make_checkpoint(tmp_path / "model", "llama")
    for module, *values in (
        ("dying", "SIGABRT", "last words"),
        ("failing", "exit code 1", "no such layer"),
    ):
        with raises("exporter-failed", "the builder", *values):
            onnx_exporters.run_module(module, [], "the builder", model)
    genai = onnx_exporters.load("genai")
    monkeypatch.setattr(onnx_exporters, "run_module", lambda *arguments: None)
    with raises("no-graph-written"):
        genai.build(model, tmp_path / "out")


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the package and the pip line, before the work of minutes."""
    for name, module in (("genai", "onnxruntime_genai"), ("torch", "onnxscript")):
        exporter = onnx_exporters.load(name)
        monkeypatch.setitem(sys.modules, module, None)
        with raises("missing-extra", 'pip install "racdeploy[onnx]"'):
            exporter.check_environment()


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        ({"out": "m.gguf"}, "wrong-file-name", "m.onnx"),
        ({"quant": "q8_0"}, "not-stored-by-format", "quant 'q8_0'"),
        ({"packing": "bitmask"}, "not-stored-by-format", "packing 'bitmask'"),
        ({"exporter": "genay"}, "unknown-plugin", "'genai'"),
        ({"metadata": {"racdeploy.tensors": "x"}}, "reserved-metadata-key", "'racdeploy.tensors'"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path, arguments: dict[str, Any], code: str, value: str
) -> None:
    """What the format does not store is named with what it stores."""
    wanted = {"out": "m.onnx", "quant": "f16"} | arguments
    with raises(code, value):
        export(checkpoint, tmp_path / wanted.pop("out"), **wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("chosen")
def test_a_full_disk_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work where the size is known, and in its middle."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
        with raises("disk-full", str(tmp_path)):
            export(checkpoint, tmp_path / "m.onnx", quant="f16")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with raises("write-failed", "No space left on device"):
            export(checkpoint, tmp_path / "m.onnx", quant="f16")
    assert not list(tmp_path.iterdir())


def _entry(model: onnx.ModelProto, **values: str) -> None:
    tensor = next(
        t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
    )
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)


HOSTILE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no protobuf": (lambda file: file.write_bytes(b"\xff" * 64), "damaged-onnx", "m.onnx"),
    "empty": (lambda file: file.write_bytes(b""), "no-onnx-graph", "m.onnx"),
    "cut": (
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        "damaged-onnx",
        "m.onnx",
    ),
    "data missing": (
        lambda file: file.with_name("m.onnx_data").unlink(),
        "missing-data-file",
        "m.onnx_data",
    ),
    "data cut": (
        lambda file: file.with_name("m.onnx_data").write_bytes(b"x"),
        "wrong-data-place",
        "m.onnx_data",
    ),
    "data elsewhere": (
        lambda file: _rewrite(file, location="../m.onnx_data"),
        "data-outside-folder",
        "'../m.onnx_data'",
    ),
    "data at the root": (
        lambda file: _rewrite(file, location="/etc/passwd"),
        "data-outside-folder",
        "'/etc/passwd'",
    ),
    "another length": (lambda file: _rewrite(file, length="12"), "wrong-data-place", "m.onnx_data"),
    "no number": (lambda file: _rewrite(file, offset="many"), "wrong-data-place", "'many'"),
    "below zero": (lambda file: _rewrite(file, offset="-4096"), "wrong-data-place", "m.onnx_data"),
    "another list": (
        lambda file: _relist(file, lambda rows: rows[0].update(shape=[3, 3])),
        "damaged-tensor-list",
        "[3, 3]",
    ),
    "an unknown quant": (
        lambda file: _relist(file, lambda rows: rows[0].update(quant="q8_0")),
        "damaged-tensor-list",
        "'q8_0'",
    ),
    "no list": (
        lambda file: _relist(file, lambda rows: rows.append(7)),
        "damaged-tensor-list",
        "7",
    ),
}


def _rewrite(file: Path, **values: str) -> None:
    model = onnx.load(str(file), load_external_data=False)
    _entry(model, **values)
    file.write_bytes(model.SerializeToString())


def _relist(file: Path, change: Callable[[list[Any]], Any]) -> None:
    model = onnx.load(str(file), load_external_data=False)
    (listed,) = (entry for entry in model.metadata_props if entry.key == "racdeploy.tensors")
    rows = json.loads(listed.value)
    change(rows)
    listed.value = json.dumps(rows)
    file.write_bytes(model.SerializeToString())


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_an_error_and_no_crash(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Truncated, mistyped and path-escaping files are named."""
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", 1000)
    export(checkpoint, tmp_path / "m.onnx", quant="f16")
    change, code, value = HOSTILE[name]
    change(tmp_path / "m.onnx")
    with raises(code, value):
        measure(tmp_path / "m.onnx")


def test_a_graph_of_somebody_else_is_shown_as_it_is(built: Path) -> None:
    """Types and zeros of every initializer; nothing is known of number formats."""
    fields, rows = measure(built)
    assert fields["onnx.inputs"] == "input_ids, attention_mask"
    found = {row.name: row for row in rows}
    assert found["model.layers.0.mlp.gate_proj.MatMul.weight"].zeros >= 0.5
    assert {row.type for row in rows} == {"float"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "exporter", ["genai", pytest.param("optimum", marks=needs_optimum), "torch"]
)
@pytest.mark.parametrize(
    "shape", [*FAMILIES, "untied with biases", "llama3 rope", "transformers 5", "yarn"]
)
def test_every_family_passes_parity_or_says_why(tmp_path: Path, exporter: str, shape: str) -> None:
    """Each exporter takes each family, tied or not, whichever transformers wrote it."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    special: dict[str, tuple[str, dict[str, Any]]] = {
        "untied with biases": ("llama", {"tied": False, "attention_bias": True}),
        "llama3 rope": (
            "llama",
            {"rope_scaling": llama3 | {"original_max_position_embeddings": 64}},
        ),
        "transformers 5": ("qwen3", {"transformers5": True, "rope_theta": 5000.0}),
        "yarn": ("qwen2", {"rope_scaling": yarn}),
    }
    family, config = special.get(shape, (shape, {}))
    folder = make_checkpoint(tmp_path / "model", family, **config)
    turn_decay_rates(folder)
    checkpoint = Checkpoint(folder)
    has_state = "linear_attention" in checkpoint.shape.layer_types
    if exporter == "torch" and has_state and not TRACES_STATES:
        pytest.skip("torch exports states from transformers 5.24 on")
    refused = {
        ("genai", "smollm3"): "onnxruntime-genai's model builder",
        ("genai", "yarn"): "YaRN",
        ("optimum", "gemma3_text"): "'model.embed_tokens.weight'",
        ("optimum", "gpt_oss"): "experts",
        ("torch", "gpt_oss"): "experts",
        ("torch", "lfm2_moe"): "experts",
        ("torch", "qwen3_moe"): "experts",
        ("optimum", "granitemoehybrid"): "layer_types",
        ("torch", "gemma3n_text"): "erf_inv",
        ("torch", "lfm2"): "kind conv",
        ("torch", "gemma4_text"): "share the keys and values",
    }
    # What an exporter says of families that it does not know.
    unknown = {
        "genai": f"genai: {checkpoint.family.architecture}",
        "optimum": f"Trying to export a {family} model, that is a custom or unsupported",
        "torch": f"no reason is known: is {family} in TESTED_FAMILIES of exporters/torch?",
    }
    is_tested = family in plugins.load("onnx_exporters", exporter).TESTED_FAMILIES
    if (exporter, shape) in refused or not is_tested:
        reason = refused.get((exporter, shape), unknown[exporter])
        with raises("no-onnx-exporter", f"{exporter}: ", reason):
            export_verified_graph(checkpoint, exporter)
        return
    assert f"by {exporter}" in export_verified_graph(checkpoint, exporter).note


def test_parity_has_the_limit_that_the_documents_name() -> None:
    """1e-4 of the largest logit, in prefill and in cached decode."""
    assert exporter_choice.PARITY_TOLERANCE == 1e-4
