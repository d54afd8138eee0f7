"""A packing is one file in the folder.

Its code packs what is shipped, and its name stands in the artifact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from racdeploy import plugins
from racdeploy.exporting import gguf as gguf_format
from racdeploy.exporting import onnx as onnx_format
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing import packers, racgguf
from racdeploy.tensors.gguf_header import read_header
from tests.support.sparse_onnx import sparse_checkpoint, use_one_graph

# Every byte inverted, and in a GGUF file every second one dropped where they come in equal pairs.
MIRROR = """
import numpy as np

from racdeploy.packing import racgguf
from racdeploy.packing.onnx.packer import BaseGraphPacker

FORMATS = ("gguf", "onnx")
REQUIRES_ZEROS = True
KEEPS_PLAIN_FILE = False
SUFFIX = racgguf.SUFFIX


def reason_for_plain(quant, zeros_fraction):
    return "" if zeros_fraction > 0.25 else "too few zeros for a mirror"


def usage(path):
    return ["Hold it in front of a mirror."]


class TensorPacker:
    def __init__(self, header, source):
        self.source = source

    def reason_for_plain(self, tensor):
        return "" if tensor.name.endswith("ffn_up.weight") else "only one of them is mirrored"

    def pack(self, tensor):
        (plain,) = racgguf.iter_tensor_bytes(tensor, self.source, tensor.size_bytes)
        kept = plain.view("<u4")[plain.view("<u4") != 0]
        yield np.packbits(plain.view("<u4") != 0).tobytes()
        yield (~kept).tobytes()


def pack_file(plain, out):
    return racgguf.pack(plain, out, "mirror", TensorPacker)


def find_damage(tensor):
    return "" if tensor.ggml_type == 0 else "is no mirror image"


def unpack_tensor(tensor, source):
    count = tensor.plain_bytes // 4
    plain = np.zeros(count, "<u4")
    keep = np.unpackbits(source.read(-(-count // 8)), count=count).astype(bool)
    plain[keep] = ~source.read(source.remaining).view("<u4")
    yield plain.view(np.uint8)


class GraphPacker(BaseGraphPacker):
    ARRAY_SUFFIXES = (".image",)

    def reason_for_plain(self, tensor, zeros):
        return reason_for_plain(tensor.quant, zeros)

    def store(self, tensor, arrays, zeros):
        (values,) = arrays.values()
        return {f"{tensor.name}.image": ~values.view("<u4")}

    def read(self, tensor, arrays):
        (image,) = arrays.values()
        return {tensor.name: (~image).view("<f4")}
"""


@pytest.fixture(autouse=True)
def _mirror(tmp_path: Path) -> Iterator[None]:
    """Add a packing file to the folder, seen for one test."""
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "mirror.py").write_text(MIRROR)
    packers.__path__.append(str(folder))
    plugins.list_names.cache_clear()
    yield
    packers.__path__.remove(str(folder))
    plugins.list_names.cache_clear()
    sys.modules.pop("racdeploy.packing.packers.mirror", None)


@pytest.fixture
def sparse(tmp_path: Path) -> Checkpoint:
    return sparse_checkpoint(tmp_path / "model")


def test_a_gguf_file_is_packed_named_and_unpacked_by_it(sparse: Checkpoint, tmp_path: Path) -> None:
    """One tensor of each block is a mirror image.

    The container says so, and gives the plain file back.
    """
    plain = gguf_format.export(sparse, tmp_path / "m.gguf", quant="f32")
    packed = gguf_format.export(sparse, tmp_path / "m.racgguf", quant="f32", packing="mirror")

    assert {tensor.packing for tensor in packed.tensors} == {"plain", "mirror"}
    reasons = {tensor.packing_reason for tensor in packed.tensors if tensor.packing == "plain"}
    assert reasons == {"only one of them is mirrored"}
    assert read_header(packed.path).metadata["racgguf.packing"] == "mirror"
    measured = {row.name: row.packing for row in gguf_format.measure(packed.path)[1]}
    assert measured == {tensor.name: tensor.packing for tensor in packed.tensors}

    container = racgguf.Container.open(packed.path)
    (tensor, *_) = (tensor for tensor in container.tensors if tensor.packing == "mirror")
    raw = np.fromfile(packed.path, np.uint8, tensor.stored_bytes, offset=tensor.position)
    kept = ~raw[-(-tensor.plain_bytes // 32) :].view("<u4")
    weight = np.concatenate(list(container.iter_chunks(tensor))).view("<u4")
    np.testing.assert_array_equal(kept, weight[weight != 0])

    (tmp_path / "m.gguf").unlink()
    assert file_sha256(gguf_format.unpack(packed.path)) == plain.sha256 == packed.unpacked_sha256


def test_an_onnx_graph_is_packed_named_and_read_by_it(
    sparse: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse tensors are mirror images in the graph, which says so, and are read as plain ones."""
    use_one_graph(monkeypatch)
    plain = onnx_format.export(sparse, tmp_path / "plain.onnx", quant="f32")
    packed = onnx_format.export(sparse, tmp_path / "m.onnx", quant="f32", packing="mirror")

    found = {tensor.packing: tensor for tensor in packed.tensors}
    assert set(found) == {"plain", "mirror"}
    assert found["plain"].packing_reason == "too few zeros for a mirror"
    measured = {row.name: (row.packing, row.zeros) for row in onnx_format.measure(packed.path)[1]}
    zeros = {tensor.name: tensor.zeros for tensor in plain.tensors}
    # torch's graph has constants beside the weights.
    expected = {t.name: (t.packing, zeros[t.name]) for t in packed.tensors}
    assert {name: measured[name] for name in expected} == expected

    graph = onnx.load(str(packed.path)).graph
    images = [value.name for value in graph.initializer if value.name.endswith(".image")]
    assert images == [f"{t.name}.image" for t in packed.tensors if t.packing == "mirror"]
