"""The second graph of packing ``bitmask_op``: the plain one's weights bit for bit, and smaller."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from racdeploy import packing as packings
from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.bundles.inspect import inspect_path
from racdeploy.exporting.onnx import export, measure
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy_kernels.sparse_matrix import ACCEL_KEY, KERNEL_FORMATS
from tests.support.errors import raises
from tests.support.packed_files import draw_rows, store_in_onnx
from tests.support.sparse_onnx import sparse_checkpoint, use_one_graph

QUANTS = tuple(KERNEL_FORMATS)
ROOT = Path(__file__).parents[2]
LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return sparse_checkpoint(tmp_path_factory.mktemp("accel") / "model")


@pytest.fixture(autouse=True)
def _one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_graph(monkeypatch)


@pytest.mark.parametrize("quant", QUANTS)
def test_the_plain_graph_stays_and_the_second_has_its_weights(
    sparse: Checkpoint, tmp_path: Path, quant: str
) -> None:
    """The main file is the plain one; tensor by tensor the second has equal zeros, fewer bytes."""
    (tmp_path / "plain").mkdir()
    plain = export(sparse, tmp_path / "plain" / "m.onnx", quant=quant)
    packed = export(sparse, tmp_path / "m.onnx", quant=quant, packing="bitmask_op")
    assert packed.sha256 == plain.sha256 == file_sha256(tmp_path / "m.onnx")
    assert set(packed.files) == {"m.onnx", "m.accel.onnx", "m.accel.onnx_data"}
    assert packed.size_bytes == plain.size_bytes == (tmp_path / "m.onnx").stat().st_size
    rows = {row.name: row for row in measure(tmp_path / "m.accel.onnx")[1]}
    bits = {"f16": 16, "matmulnbits_8": 8, "matmulnbits_4": 4}[quant]
    for tensor in packed.tensors:
        row = rows[tensor.name]
        assert (row.packing, row.zeros) == (tensor.packing, tensor.zeros)
        assert row.shape == sparse.entries[tensor.name].shape
        assert bool(tensor.packing_reason) == (tensor.packing == "plain")
        if tensor.packing == "plain":
            assert row.size_bytes == tensor.size_bytes
            continue
        O, I = tensor.shape
        kept = round((1 - tensor.zeros) * O * I) * bits / 8
        heads = O * -(-I // 256) * (32 if quant == "f16" else 48)
        uneven = O * math.isqrt(I) if bits == 4 else 0  # the longer of two streams counts
        assert kept + heads <= row.size_bytes <= kept + heads + 8 * (O + 1) + 128 + uneven
    assert {tensor.packing for tensor in packed.tensors if "_proj" in tensor.name} == {"bitmask_op"}
    assert any("m.accel.onnx" in note for note in packed.notes)


def test_the_second_graph_says_what_is_packed(sparse: Checkpoint, tmp_path: Path) -> None:
    """Number format, weights and zeros, read without the weights; nothing else is left over."""
    result = export(sparse, tmp_path / "m.onnx", quant="matmulnbits_8", packing="bitmask_op")
    graph = onnx.load(tmp_path / "m.accel.onnx", load_external_data=False)
    (said,) = json.loads({each.key: each.value for each in graph.metadata_props}[ACCEL_KEY])
    packed = [tensor for tensor in result.tensors if tensor.packing == "bitmask_op"]
    weights = sum(int(np.prod(tensor.shape)) for tensor in packed)
    zeros = sum(int(np.prod(tensor.shape)) * tensor.zeros for tensor in packed) / weights
    assert said == {"quant": 8, "weights": weights, "zeros": pytest.approx(zeros)}
    model = onnx.load(str(tmp_path / "m.accel.onnx"))
    products = [node for node in model.graph.node if node.op_type == "SparseMatMul"]
    assert len(products) == len(packed)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    onnx.checker.check_model(model)


def test_inspecting_counts_the_weights_beside_a_graph(sparse: Checkpoint, tmp_path: Path) -> None:
    """A graph's size is of both its files, and not of the second graph."""
    made = export(sparse, tmp_path / "m.onnx", quant="f16", packing="bitmask_op")
    second = sum((tmp_path / name).stat().st_size for name in ("m.accel.onnx", "m.accel.onnx_data"))
    assert inspect_path(tmp_path / "m.accel.onnx").summary["size_bytes"] == second
    assert inspect_path(tmp_path / "m.onnx").summary["size_bytes"] == made.size_bytes


def test_a_dense_model_has_no_second_graph(tmp_path: Path) -> None:
    """And every tensor a reason."""
    (tmp_path / "m.accel.onnx").write_bytes(b"stale")
    dense = sparse_checkpoint(tmp_path / "model", sparsity=0.0)
    result = export(dense, tmp_path / "m.onnx", quant="matmulnbits_8", packing="bitmask_op")
    assert list(result.files) == ["m.onnx"]
    assert not (tmp_path / "m.accel.onnx").exists()
    assert all(tensor.packing_reason for tensor in result.tensors)
    assert any("no tensor is sparse enough" in note for note in result.notes)


def test_another_form_of_matrices_is_not_read_as_this_one(
    sparse: Checkpoint, tmp_path: Path
) -> None:
    """The version of the operator's domain tells a file of an earlier racdeploy from today's."""
    export(sparse, tmp_path / "m.onnx", quant="matmulnbits_8", packing="bitmask_op")
    model = onnx.load(str(tmp_path / "m.accel.onnx"), load_external_data=False)
    (opset,) = (opset for opset in model.opset_import if opset.domain == "racdeploy")
    opset.version -= 1
    (tmp_path / "m.accel.onnx").write_bytes(model.SerializeToString())
    with raises("unknown-packing-version", "m.accel.onnx"):
        measure(tmp_path / "m.accel.onnx")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_what_is_stored_is_read_back(tmp_path: Path, quant: str, sparsity: float) -> None:
    """Every byte returns, and the file names the packing where it pays: it is smaller there."""
    packed_OP, zeros = draw_rows(quant, 64, sparsity)
    found, size_bytes, rows_OP = store_in_onnx(tmp_path, "bitmask_op", quant, packed_OP, zeros)
    assert found == ("bitmask_op" if sparsity else "plain")
    np.testing.assert_array_equal(rows_OP, packed_OP)
    assert (size_bytes < 0.85 * packed_OP.size) == (sparsity > 0)


@pytest.mark.parametrize("quant", plugins.list_names("quant"))
def test_other_quants_are_refused_before_any_work(quant: str) -> None:
    """With those that work; what is not refused pays at half the zeros, never at none."""
    if "onnx" not in quants.load(quant).formats:
        return
    if quant not in QUANTS:
        with raises("packing-unfit-for-quant", "bitmask_op", quant) as caught:
            packings.check("onnx", quant, "bitmask_op")
        assert caught.value.remedy.endswith(f"quants {', '.join(sorted(QUANTS))}")
        return
    packings.check("onnx", quant, "bitmask_op")
    packing = packings.load("bitmask_op")
    assert packing.reason_for_plain(quant, 0.5) == ""
    assert packing.reason_for_plain(quant, 0.0) != ""


def test_kept_inputs_keep_every_promise() -> None:
    """The hostile graphs that fuzzing found, a third of which are of this packing."""
    command = [sys.executable, "-m", "tests.fuzz", "onnx", "--replay"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("inputs replayed\n"), done.stdout + done.stderr


DAMAGES = {
    "a mask bit more": (
        f"{LINEAR}.heads",
        lambda array: array[0].__setitem__(16, array[0, 16] ^ 255),
    ),
    "an offset beyond the values": (
        f"{LINEAR}.offsets",
        lambda array: array.__setitem__(-1, 1 << 40),
    ),
    "offsets that descend": (f"{LINEAR}.offsets", lambda array: array.__setitem__(1, -5)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_second_graph_is_an_error(sparse: Checkpoint, tmp_path: Path, name: str) -> None:
    """Measuring names the tensor."""
    export(sparse, tmp_path / "m.onnx", quant="matmulnbits_8", packing="bitmask_op")
    model = onnx.load(str(tmp_path / "m.accel.onnx"))
    initializer, change = DAMAGES[name]
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == initializer)
    array = onnx.numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, initializer))
    onnx.save(model, str(tmp_path / "damaged.onnx"))
    with raises("arrays-do-not-fit", "up_proj"):
        measure(tmp_path / "damaged.onnx")
