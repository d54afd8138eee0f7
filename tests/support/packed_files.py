"""One tensor in a file of each format, stored and read by the calls that exporters make."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from onnx import TensorProto, helper

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.exporting.gguf import measure as measure_gguf
from racdeploy.exporting.onnx.graph import WeightlessGraph
from racdeploy.exporting.onnx.weights import connect_weights
from racdeploy.packing import racgguf
from racdeploy.packing.onnx.file import load_graph, write_model
from racdeploy.packing.onnx.tensors import (
    TENSORS_KEY,
    GraphTensor,
    StoredArrays,
    arrays_to_rows,
    dump_tensors,
    read_tensors,
    rows_to_arrays,
)
from racdeploy.sparse_kernels import accel_name

FORMATS = ("gguf", "onnx")


def draw_rows(quant: str, rows: int, sparsity: float) -> tuple[np.ndarray, float]:
    """Return packed rows of 512 weights, and the fraction of zeros that are read from them."""
    generator = np.random.default_rng(0)
    weight_OI = generator.standard_normal((rows, 512)).astype(np.float32)
    weight_OI[generator.random(weight_OI.shape) < sparsity] = 0
    packed_OP = quants.load(quant).quantize(weight_OI)
    return packed_OP, float(np.mean(quants.load(quant).dequantize(packed_OP, 512) == 0))


def write_plain_gguf(file: Path, quant: str, packed_OP: np.ndarray) -> Path:
    """Write a GGUF file with one tensor, ``w``."""
    writer = gguf.GGUFWriter(file, "llama")
    kind = gguf.GGMLQuantizationType(quants.load_ggml(quant).type_id)
    writer.add_tensor("w", packed_OP, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def store_in_gguf(
    folder: Path, packing: str, quant: str, packed_OP: np.ndarray
) -> tuple[str, int, bytes, bytes]:
    """Pack a file and unpack it.

    Returns:
        The packing that the file names for its tensor, its bytes there, the plain file and the
        unpacked one.
    """
    plain = write_plain_gguf(folder / "plain.gguf", quant, packed_OP)
    expected = plain.read_bytes()
    form = packings.load_gguf(packing)
    out = folder / f"out{form.SUFFIX}"
    form.pack_file(plain, out)

    (row,) = measure_gguf(out)[1]
    restored = out
    if out.suffix == racgguf.SUFFIX:
        restored = folder / "restored.gguf"
        racgguf.Container.open(out).unpack(restored)
    return row.packing, row.size_bytes, expected, restored.read_bytes()


def store_in_onnx(
    folder: Path, packing: str, quant: str, packed_OP: np.ndarray, zeros: float
) -> tuple[str, int, np.ndarray]:
    """Write a graph that multiplies by the tensor ``w``, and read the tensor from its file.

    Returns:
        The packing that the file names for its tensor, its bytes there, and its packed rows.
    """
    form, file = packings.load_onnx(packing), folder / "model.onnx"
    tensor = GraphTensor("w", (len(packed_OP), 512), quant, is_embedding=False)
    model = connect_weights(_product_graph(*tensor.shape), [tensor])
    packer = form.GraphPacker(model, file)

    reason = packer.reason_for_plain(tensor, zeros)
    arrays = rows_to_arrays(tensor, packed_OP)
    if not reason:
        arrays = packer.store(tensor, arrays, zeros)
    label = "plain" if reason or form.KEEPS_PLAIN_FILE else packing
    listed = dump_tensors([GraphTensor("w", tensor.shape, quant, False, label)])
    write_model(model, arrays.items(), folder, file.name, lambda: {TENSORS_KEY: listed})
    packer.after_write()

    if form.KEEPS_PLAIN_FILE and not reason:
        file = folder / accel_name(file.name)
    model = load_graph(file)
    (found,) = read_tensors({entry.key: entry.value for entry in model.metadata_props}, file)
    stored, size_bytes = StoredArrays(model, file).read(found)
    return found.packing, size_bytes, arrays_to_rows(found, stored)


def _product_graph(O: int, I: int) -> WeightlessGraph:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
            "one product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, I])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, O])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    return WeightlessGraph(model, {}, frozenset({"w"}), frozenset(), frozenset())
