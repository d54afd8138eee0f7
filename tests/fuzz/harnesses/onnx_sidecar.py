"""ONNX graphs with what lies beside them, as ``inspect``, ``unpack`` and the runtime read them.

An input is the length of a graph and that of its sidecar, four bytes each, and the two, then the
external data. What is unpacked has the weights that were measured; a sidecar is written again.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.bundles.inspect import inspect_path
from racdeploy.errors import RacdeployError, UsageError
from racdeploy.export.onnx.writer import unpack
from racdeploy.packing.onnx.file import write_model
from racdeploy.packing.onnx.packer import data_name
from racdeploy.packing.onnx.second_graph import write_second
from racdeploy.packing.onnx.tensors import (
    TENSORS_KEY,
    GraphTensor,
    list_tensors,
    split_arrays,
)
from racdeploy.packing.raconnx import Writer, load_sidecar, sidecar_name
from racdeploy.packing.sparse_matrix import accel_name
from tests.fuzz.harness import Mutate, Mutator
from tests.fuzz.mutation import change_json
from tests.fuzz.oracle import expect, place, scratch

READERS = (
    *("racdeploy.packing.raconnx", "racdeploy.packing.onnx.file", "racdeploy.packing.onnx.tensors"),
    *("racdeploy.packing.packers.bitmask_graph", "racdeploy.packing.sparse_matrix"),
    "racdeploy.export.onnx.measurement",
)
DICTIONARY = (b"RACONNX1", b"racdeploy.tensors", b"location", b"offset", b"length", b"|u1", b"<f4")
_NAME = "m.onnx"
_WORDS = (
    *("plain", "bitmask_graph", "bitmask_sidecar", "bitmask_op", "f32", "f16", "matmulnbits_8"),
    *("matmulnbits_4", "<f4", "<f2", "|u1", "w", [4, 64], [64], "shape", "looked_up", 2**33),
)
_Parts = tuple[bytes, bytes, bytes]


def target(data: bytes) -> None:
    """Join a sidecar, inspect a graph, and unpack it."""
    graph, sidecar, external = _split(data)
    model = place(_NAME, graph)
    place(sidecar_name(_NAME), sidecar)
    place(data_name(_NAME), external)
    _load_sidecar(model)

    found = inspect_path(model)
    with contextlib.suppress(UsageError):  # nothing in it is packed
        plain = scratch() / "plain.onnx"
        plain.unlink(missing_ok=True)
        unpack(model, plain)

        again = inspect_path(plain)
        ours = {row["name"]: (row["shape"], row["zeros"]) for row in found["tensors"]}
        theirs = {row["name"]: (row["shape"], row["zeros"]) for row in again["tensors"]}
        expect(ours == theirs, f"{ours} packed, {theirs} unpacked")


def _load_sidecar(model: Path) -> None:
    """Read a sidecar; what it holds is read alike once it is written again."""
    with contextlib.suppress(RacdeployError):
        arrays = load_sidecar(model)
        copied = scratch() / "copied.onnx"
        writer = Writer(copied.with_name(sidecar_name(copied.name)))
        for name, values in arrays.items():
            writer.add(name, values)
        writer.close()

        again = load_sidecar(copied) if arrays else {}
        same = arrays.keys() == again.keys() and all(
            values.tobytes() == again[name].tobytes() and values.shape == again[name].shape
            for name, values in arrays.items()
        )
        expect(same, "the sidecar is written as another one")


def _split(data: bytes) -> _Parts:
    first, second = struct.unpack("<II", data[:8].ljust(8, b"\0"))
    return data[8 : 8 + first], data[8 + first : 8 + first + second], data[8 + first + second :]


def _join(parts: _Parts) -> bytes:
    graph, sidecar, external = parts
    return struct.pack("<II", len(graph), len(sidecar)) + graph + sidecar + external


def seeds() -> Iterator[bytes]:
    """Yield a graph of each packing and of each number format that it packs."""
    for packing in packings.names("onnx"):
        for quant in ("f32", "f16", "matmulnbits_8", "matmulnbits_4"):
            if packings.load_onnx(packing).fits(quant, 0.9) == "":
                yield _write(packing, quant)

    yield _join((_write_foreign(), b"", bytes(64)))


def _write(packing: str, quant: str) -> bytes:
    """Return one linear in a graph, as an export of that packing writes it."""
    folder = scratch() / "seed"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()

    model = _make_model()
    tensor = GraphTensor("w", (2, 64), quant, looked_up=False, packing=packing)
    rows_OI = np.random.default_rng(0).standard_normal(tensor.shape, dtype=np.float32)
    rows_OI[:, 3:60] = 0
    arrays = split_arrays(tensor, quants.load(quant).quantize(rows_OI))

    chosen = packings.load_onnx(packing)
    packer = chosen.GraphPacker(model, folder / _NAME)
    stored = dict(packer.store(tensor, arrays, 0.9))
    packer.finish()
    listed = replace(tensor, packing="plain") if chosen.BESIDE_PLAIN else tensor
    properties = {TENSORS_KEY: list_tensors([listed])}
    write_model(model, stored.items(), folder, _NAME, lambda: properties)

    main = folder / _NAME
    if chosen.BESIDE_PLAIN:
        write_second(main, packing, {"w": 0.9})
        main = folder / accel_name(_NAME)
    graph = main.read_bytes().replace(data_name(main.name).encode(), data_name(_NAME).encode())
    beside = [folder / sidecar_name(_NAME), folder / data_name(main.name)]
    sidecar, external = (file.read_bytes() if file.is_file() else b"" for file in beside)
    return _join((graph, sidecar, external))


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
    """Change one of the three parts: as bytes, or as what it is."""

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        parts = list(_split(data))
        number = random.choice((0, 0, 0, 1, 1, 2))
        room = max(0, most - 8 - sum(map(len, parts)) + len(parts[number]))

        kinds = (_change_graph, _change_sidecar, _change_nothing)
        changed = kinds[number](parts[number], random) if random.random() < 0.6 else None
        if changed is None or len(changed) > room:
            changed = mutate(parts[number], room)
        parts[number] = changed
        return _join((parts[0], parts[1], parts[2]))

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


def _change_sidecar(data: bytes, random: Random) -> bytes | None:
    length = int.from_bytes(data[8:16], "little")
    header = change_json(data[16 : 16 + length], random, _WORDS)
    if header is None:
        return None
    return data[:8] + len(header).to_bytes(8, "little") + header + data[16 + length :]


def _change_nothing(data: bytes, random: Random) -> None:
    return None
