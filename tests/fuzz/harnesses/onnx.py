"""ONNX graphs with the file of their weights, as ``inspect`` reads them.

An input is the length of a graph in four bytes, the graph, then its external data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from random import Random

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.bundles.inspect import inspect_path
from racdeploy.errors import EngineError
from racdeploy.packing.onnx.file import write_model
from racdeploy.packing.onnx.packer import data_name
from racdeploy.packing.onnx.tensors import (
    TENSORS_KEY,
    GraphTensor,
    dump_tensors,
    rows_to_arrays,
)
from racdeploy.sparse_kernels import accel_name
from tests.fuzz.harness import Mutate, Mutator
from tests.fuzz.mutation import change_json
from tests.fuzz.oracle import place, scratch

READERS = (
    *("racdeploy.packing.onnx.file", "racdeploy.packing.onnx.tensors"),
    *("racdeploy.packing.packers.bitmask_graph", "racdeploy.exporting.onnx.measurement"),
)
DICTIONARY = (b"racdeploy.tensors", b"location", b"offset", b"length", b"|u1", b"<f4")
_NAME = "m.onnx"
_WORDS = (
    *("plain", "bitmask_graph", "bitmask_op", "f32", "f16", "matmulnbits_8"),
    *("matmulnbits_4", "<f4", "<f2", "|u1", "w", [4, 64], [64], "shape", "is_embedding", 2**33),
)


def target(data: bytes) -> None:
    """Inspect a graph."""
    graph, external = _split(data)
    model = place(_NAME, graph)
    place(data_name(_NAME), external)
    inspect_path(model)


def _split(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
    return data[4 : 4 + length], data[4 + length :]


def _join(graph: bytes, external: bytes) -> bytes:
    return struct.pack("<I", len(graph)) + graph + external


def seeds() -> Iterator[bytes]:
    """Yield a graph of each packing and of each number format that it packs."""
    for packing in packings.list_supported("onnx", "packing"):
        with suppress(EngineError):  # bitmask_op, where racdeploy-kernels is not installed
            for quant in ("f32", "f16", "matmulnbits_8", "matmulnbits_4"):
                if packings.load_onnx(packing).reason_for_plain(quant, 0.9) == "":
                    yield _write(packing, quant)

    yield _join(_write_foreign(), bytes(64))


def _write(packing: str, quant: str) -> bytes:
    """Return one linear in a graph, as an export of that packing writes it."""
    folder = scratch() / "seed"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()

    model = _make_model()
    tensor = GraphTensor("w", (2, 64), quant, is_embedding=False, packing=packing)
    rows_OI = np.random.default_rng(0).standard_normal(tensor.shape, dtype=np.float32)
    rows_OI[:, 3:60] = 0
    arrays = rows_to_arrays(tensor, quants.load(quant).quantize(rows_OI))

    chosen = packings.load_onnx(packing)
    packer = chosen.GraphPacker(model, folder / _NAME)
    stored = packer.store(tensor, arrays, 0.9)
    listed = replace(tensor, packing="plain") if chosen.KEEPS_PLAIN_FILE else tensor
    properties = {TENSORS_KEY: dump_tensors([listed])}
    write_model(model, stored.items(), folder, _NAME, lambda: properties)

    main = folder / _NAME
    if chosen.KEEPS_PLAIN_FILE:
        packer.after_write()
        main = folder / accel_name(_NAME)
    graph = main.read_bytes().replace(data_name(main.name).encode(), data_name(_NAME).encode())
    beside = folder / data_name(main.name)
    return _join(graph, beside.read_bytes() if beside.is_file() else b"")


def _make_model() -> onnx.ModelProto:
    product = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])]
    graph = helper.make_graph([product], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def _write_foreign() -> bytes:
    """Return a graph of another program, with weights of several types and in another file."""
    model = _make_model()
    for kind in (TensorProto.FLOAT16, TensorProto.INT4, TensorProto.BOOL, TensorProto.STRING):
        model.graph.initializer.add(name=f"t{kind}", dims=[2], data_type=kind, raw_data=b"abcd")
    outside = model.graph.initializer.add(name="w", dims=[4, 4], data_type=TensorProto.FLOAT)
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_name(_NAME)), ("offset", "0"), ("length", "64")):
        outside.external_data.add(key=key, value=value)
    return bytes(model.SerializeToString(deterministic=True))


def mutator(mutate: Mutate) -> Mutator:
    """Change the graph, as bytes or as what it is, or the external data."""

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        graph, external = _split(data)
        if random.random() < 0.2:
            return _join(graph, mutate(external, max(0, most - 4 - len(graph))))

        room = max(0, most - 4 - len(external))
        changed = _change_graph(graph, random) if random.random() < 0.6 else None
        if changed is None or len(changed) > room:
            changed = mutate(graph, room)
        return _join(changed, external)

    return change


def _change_graph(data: bytes, random: Random) -> bytes | None:
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return None

    listed = [entry for entry in model.metadata_props if entry.key == TENSORS_KEY]
    properties = [entry for entry in listed if isinstance(entry.value, str)]
    if properties and random.random() < 0.5:
        text = change_json(properties[0].value.encode("utf-8", "replace"), random, _WORDS)
        properties[0].value = (text or b"[]").decode()
    elif model.graph.initializer:
        _change_tensor(random.choice(model.graph.initializer), random)
    return bytes(model.SerializeToString(deterministic=True))


def _change_tensor(tensor: TensorProto, random: Random) -> None:
    match random.randrange(4):
        case 0:
            numbers = (0, 1, 2, 4, 8, 64, 128, -1, 2**31, 2**62)
            tensor.dims[:] = [random.choice(numbers) for _ in range(random.randrange(4))]
        case 1:
            tensor.data_type = random.randrange(26)
        case 2 if tensor.external_data:
            entry = random.choice(tensor.external_data)
            entry.value = random.choice(
                ("0", "-1", "64", "9" * 30, "..", "", "m.onnx", "/etc/passwd")
            )
        case _:
            tensor.raw_data = tensor.raw_data[: random.randrange(64)] + bytes(random.randrange(3))
