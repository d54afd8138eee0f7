"""Zeros left out of ONNX files.

Smaller, the same answers, restored byte for byte, and folded by a real session.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.torch import load_file, save_file

from racdeploy.engines.backends.onnxruntime import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.errors import ArtifactError
from racdeploy.export import onnx as onnx_format
from racdeploy.export.onnx import export, measure, unpack
from racdeploy.export.onnx import exporters as onnx_exporters
from racdeploy.export.onnx import writer as onnx_writer
from racdeploy.export.onnx.choice import Chosen
from racdeploy.export.onnx.graph import adopt
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import ArtifactEntry, GenerationSettings
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing import raconnx
from racdeploy.packing.onnx.folding import prove_folding
from racdeploy.packing.packers import bitmask_graph
from tests.support.errors import raises
from tests.support.tiny_onnx import APPENDING, tiny_onnx

QUANTS = ("f32", "f16", "matmulnbits_8")
PACKINGS = ("bitmask_graph", "bitmask_sidecar")
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
    graph = adopt(file, dense, onnx_exporters.load(APPENDING))
    monkeypatch.setattr(
        onnx_writer, "choose", lambda checkpoint, exporter: Chosen(graph, "built once")
    )


def logits_of(file: Path) -> np.ndarray:
    engine = open_engine(file, EngineSettings(64, parallel=1, threads=1, cache_dtype="f32"))
    try:
        return engine.logits(IDS)
    finally:
        engine.close()


@pytest.mark.parametrize("quant", QUANTS)
def test_packed_files_are_small_answer_alike_and_come_back(
    sparse: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """Equal logits bit for bit, equal files after unpacking, zeros and sizes as measured in the
    file.
    """
    (tmp_path / "plain").mkdir()
    plain = export(sparse, tmp_path / "plain" / "m.onnx", quant=quant)
    expected_TV = logits_of(plain.path)
    for packing in PACKINGS:
        (tmp_path / packing).mkdir()
        packed = export(sparse, tmp_path / packing / "m.onnx", quant=quant, packing=packing)
        np.testing.assert_array_equal(expected_TV, logits_of(packed.path))
        assert packed.size_bytes == sum(
            file.stat().st_size for file in packed.path.parent.iterdir()
        )
        sizes = [sum(t.size_bytes for t in r.tensors if "_proj" in t.name) for r in (packed, plain)]
        codes, scales = {"f32": (32, 0.0), "f16": (16, 0.0), "matmulnbits_8": (8, 1.0)}[quant]
        ideal = (codes / 2 + 1 + scales) / (codes + scales)
        assert (
            sizes[0] / sizes[1] < ideal + 0.02
        )  # a few bytes a chunk, and the element in front of the values
        rows = {row.name: row for row in measure(packed.path)[1]}
        for before, tensor in zip(plain.tensors, packed.tensors, strict=True):
            row = rows[tensor.name]
            assert (before.zeros, tensor.zeros) == (tensor.zeros, row.zeros)
            assert (tensor.packing, tensor.size_bytes) == (row.packing, row.size_bytes)
            assert bool(tensor.packing_reason) == (tensor.packing == "plain")
        assert {t.packing for t in packed.tensors if "_proj" in t.name} == {packing}
        restored = unpack(packed.path)
        assert file_sha256(restored) == plain.sha256 == packed.unpacked_sha256


def test_half_precision_meets_the_bar(sparse: Checkpoint, tmp_path: Path) -> None:
    """At 50 % zeros the linears take at most 0.60 of the dense file's in half precision, in either
    packing.
    """
    for packing in PACKINGS:
        result = export(sparse, tmp_path / "m.onnx", quant="f16", packing=packing)
        linears = [tensor for tensor in result.tensors if "_proj" in tensor.name]
        assert sum(t.size_bytes for t in linears) <= 0.60 * sum(
            2 * np.prod(t.shape) for t in linears
        )


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
    packer.expected[final] = "0" * 64
    with raises("packed-weights-differ", repr(final)):
        prove_folding(tmp_path / "m.onnx", packer.expected)
    model.graph.initializer.remove(mask)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(mask.name, onnx.TensorProto.UINT8, mask.dims)
    )
    onnx.save(model, str(tmp_path / "open.onnx"))
    with raises("not-folded"):
        prove_folding(tmp_path / "open.onnx", {})


def test_plain_onnxruntime_reads_the_graph_and_refuses_the_sidecar(
    sparse: Checkpoint, tmp_path: Path
) -> None:
    """Any onnxruntime loads ``bitmask_graph``; ``bitmask_sidecar`` fails without its join, and
    never reads on.
    """
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_sidecar")
    with pytest.raises(Exception, match=raconnx.PLACE):
        onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx_packed"]
    export(sparse, tmp_path / "m.onnx", quant="f16")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_the_card_says_what_other_programs_need() -> None:
    """A graph with its weights beside it is unpacked first.

    One that unfolds itself is read as it is.
    """
    for packing, unpacks in (("bitmask_sidecar", True), ("bitmask_graph", False)):
        path = "onnx/model_fp16.onnx"
        values = {
            "path": path,
            "format": "onnx",
            "quant": "f16",
            "size_bytes": 1,
            "sha256": "0" * 64,
            "backend": "onnxruntime",
        }
        generation = GenerationSettings(
            temperature=0.6, top_p=0.95, max_new_tokens=64, context_tokens=256
        )
        lines = onnx_format.usage(ArtifactEntry(packing=packing, **values), generation)
        assert any("racdeploy unpack onnx/model_fp16.onnx" in line for line in lines) == unpacks
        assert sum(line.startswith("- ") for line in lines) == 3


def test_a_large_model_is_refused_with_its_price(
    sparse: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how much memory a load would pass, and what to use."""
    monkeypatch.setattr(bitmask_graph, "MOST_WEIGHTS", 100_000)
    with raises("too-large-for-packing", " GB ", "bitmask_sidecar"):
        export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_sidecar")


def test_unpacking_needs_something_packed(sparse: Checkpoint, tmp_path: Path) -> None:
    """A plain graph, the graph itself as its own copy, and a name that is none."""
    export(sparse, tmp_path / "m.onnx", quant="f16")
    with raises("nothing-packed", "m.onnx"):
        unpack(tmp_path / "m.onnx")
    for out in (tmp_path / "m.onnx", tmp_path / "m.gguf"):
        with raises("wrong-file-name", str(out)):
            unpack(tmp_path / "m.onnx", out)


def test_unpacking_replaces_no_other_file(sparse: Checkpoint, tmp_path: Path) -> None:
    """What lies where the plain graph goes stays, unless it is that graph already."""
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_graph")
    there = tmp_path / "m.plain.onnx"
    there.write_bytes(b"mine")
    with raises("output-exists", "m.plain.onnx"):
        unpack(tmp_path / "m.onnx")
    assert there.read_bytes() == b"mine"
    there.unlink()
    assert file_sha256(unpack(tmp_path / "m.onnx")) == file_sha256(unpack(tmp_path / "m.onnx"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.plain.onnx"]


def _edit_header(file: Path, change: Callable[[dict], None]) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header = json.loads(raw[16 : 16 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(raw[:8] + struct.pack("<Q", len(text)) + text + raw[16 + length :])


def _first(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda file: _edit_header(file, lambda header: change(next(iter(header.values()))))  # type: ignore[arg-type, return-value]


HOSTILE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda file: file.unlink(), "missing-data-file", "m.onnx_packed"),
    "empty": (lambda file: file.write_bytes(b""), "no-packed-weights", "m.onnx_packed"),
    "another file": (
        lambda file: file.write_bytes(b"GGUF" + bytes(100)),
        "no-packed-weights",
        "m.onnx_packed",
    ),
    "a header beyond the end": (
        lambda file: file.write_bytes(b"RACONNX1" + b"\xff" * 8),
        "no-packed-weights",
        "m.onnx_packed",
    ),
    "cut": (
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        "damaged-packing-header",
        "model.layers",
    ),
    "no object": (
        lambda file: _edit_header(file, lambda header: header.update(a=[1])),
        "damaged-packing-header",
        "m.onnx_packed",
    ),
    "a tensor less": (
        lambda file: _edit_header(file, lambda header: header.pop(next(iter(header)))),
        "missing-packed-weights",
        "m.onnx_packed",
    ),
    "a huge shape": (
        _first(lambda entry: entry.update(shape=[1 << 40, 1 << 20])),
        "damaged-packing-header",
        "model.layers",
    ),
    "a negative place": (
        _first(lambda entry: entry.update(start=-8)),
        "damaged-packing-header",
        "-8",
    ),
    "another type": (
        _first(lambda entry: entry.update(dtype="<f8")),
        "damaged-packing-header",
        "<f8",
    ),
    "fewer weights": (
        _first(lambda entry: entry.update(shape=[64, 65])),
        "damaged-packing",
        "[64, 65]",
    ),
    "more weights": (_first(lambda entry: entry.update(shape=[8, 8])), "damaged-packing", "[8, 8]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_sidecar_is_an_error_and_no_crash(
    sparse: Checkpoint, tmp_path: Path, name: str
) -> None:
    """Measured, unpacked or run: each names the file, and none of them reads on."""
    export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_sidecar")
    change, code, value = HOSTILE[name]
    change(tmp_path / "m.onnx_packed")
    for use in (measure, unpack):
        with raises(code, value):
            use(tmp_path / "m.onnx")
    if name not in ("missing", "a tensor less"):
        with pytest.raises(ArtifactError):
            raconnx.load_sidecar(tmp_path / "m.onnx")
