"""Graphs that lie, bundles that do not fit.

An error that says what, and an engine's process that outlives it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
import pytest
from onnx import helper

from racdeploy import load
from racdeploy.bundles.inspect import inspect_path
from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.errors import EngineError
from racdeploy.packing.onnx.data_files import MESSAGES, find_data_files
from racdeploy.runtime.deployed import find_plain
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle, make_onnx_bundle
from tests.support.tiny_models import edit_json
from tests.support.tiny_onnx import tiny_onnx

pytestmark = pytest.mark.usefixtures("exported")

SETTINGS = EngineSettings(context_tokens=64, parallel=1, threads=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A graph of the builder with its external data, in a folder of its own."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx() / "genai", folder)
    return folder / "model.onnx"


def opened(model: Path, settings: EngineSettings = SETTINGS) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(model, settings)


def edit(model: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the graph's file; its external data stays where it is."""
    proto = onnx.load(model, load_external_data=False)
    change(proto)
    model.write_bytes(proto.SerializeToString())


def locate(model: Path, place: str) -> None:
    """Let every weight be in another file."""

    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    edit(model, change)


def test_the_untouched_graph_loads(model: Path) -> None:
    """So the others fail for what was done to them."""
    with opened(model) as engine:
        assert len(engine.generate([[3, 4]], Sampling(4, ()))[0].ids) == 4


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x08\x09" * 400, bytes(5000)])
def test_what_is_no_graph_is_refused(model: Path, content: bytes) -> None:
    model.write_bytes(content)
    with raises("onnxruntime-failed", str(model)):
        opened(model)


@pytest.mark.takes(8, "a dozen of damaged graphs, each in an engine")
def test_damaged_graphs_are_errors_and_never_a_traceback(model: Path) -> None:
    """Flipped bytes and cut files: loaded and run, or refused in one sentence."""
    random, whole = Random(0), model.read_bytes()
    refusals: list[str] = []
    for _ in range(12):
        damaged = bytearray(whole)
        for place in random.sample(range(len(damaged)), 6):
            damaged[place] ^= 1 << random.randrange(8)
        model.write_bytes(damaged[: random.choice([len(damaged), random.randrange(len(damaged))])])
        try:
            with opened(model) as engine:
                engine.generate([[3, 4]], Sampling(2, ()))
        except EngineError as error:
            refusals.append(str(error))
    assert len(refusals) >= 6
    assert not any("Traceback" in refusal for refusal in refusals)


def test_external_data_that_is_missing_or_short_is_named(model: Path) -> None:
    data = model.with_name("model.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with raises("onnxruntime-failed", "model.onnx"):
        opened(model)
    data.unlink()
    with raises("onnxruntime-failed", "model.onnx.data"):
        opened(model)


@pytest.mark.parametrize("place", ["../outside.data", "{absolute}", "link.data"])
def test_external_data_outside_the_folder_is_refused(model: Path, place: str) -> None:
    """By a path that climbs, an absolute one, and a symlink."""
    outside = model.parent.parent / "outside.data"
    shutil.move(model.with_name("model.onnx.data"), outside)
    (model.parent / "link.data").symlink_to("../outside.data")
    locate(model, place.replace("{absolute}", str(outside)))
    with raises("onnxruntime-failed", "External data path validation failed"):
        opened(model)


def test_unknown_inputs_are_named(model: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info("encoder_hidden", onnx.TensorProto.FLOAT, [1, 2])
        )

    edit(model, change)
    with raises("unknown-graph-inputs", "encoder_hidden"):
        opened(model)


def test_a_graph_without_a_cache_is_named(tmp_path: Path) -> None:
    helper = onnx.helper
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["B", "T"])
    out = helper.make_tensor_value_info("logits", onnx.TensorProto.INT64, ["B", "T"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["logits"])], "g", [ids], [out]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    with raises("graph-not-decoder", "attention_mask, past_key_values.0.key"):
        opened(tmp_path / "m.onnx")


def test_a_wrong_number_format_is_named(model: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        for value in proto.graph.input:
            if value.name == "past_key_values.1.value":
                value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    edit(model, change)
    with pytest.raises(EngineError, match=r"past_key_values\.1\.value|cannot load"):
        opened(model)


def test_a_wrong_head_size_is_found_before_the_first_prompt(model: Path) -> None:
    """The configuration says one thing, the graph computes another."""
    for name in ("genai_config.json", "config.json"):
        (model.parent / name).unlink(missing_ok=True)
    with raises("no-head-size"):
        opened(model)
    (model.parent / "config.json").write_text('{"head_dim": 8}', encoding="utf-8")
    with raises("onnxruntime-failed", "two tokens"):
        opened(model)


def test_a_damaged_file_keeps_its_kind_of_error_on_the_way_out_of_the_child(model: Path) -> None:
    """Exit code 2, as for any other damaged file, and not the 4 of a failed engine."""
    (model.parent / "genai_config.json").write_text("{", encoding="utf-8")
    with raises("invalid-json", "genai_config.json"):
        opened(model)


@pytest.mark.parametrize("prefix", ["../outside", "{root}/outside", "sub/../../outside"])
def test_a_configuration_names_no_graph_outside_of_its_folder(model: Path, prefix: str) -> None:
    """Its tokenizer and its weights would be read from there, too."""
    outside = model.parent.with_name("outside")
    shutil.copytree(model.parent, outside)
    name = prefix.format(root=model.parent.parent) + "/model.onnx"
    edit_json(model.parent / "genai_config.json", model={"decoder": {"filename": name}})
    (model.parent / "sub").mkdir()
    with raises("weights-elsewhere", "outside"):
        find_plain(model.parent)


def test_a_context_beyond_the_graph_is_an_error(model: Path) -> None:
    """The builder's rotary table ends at 256 positions."""
    with opened(model, EngineSettings(context_tokens=400, parallel=1, threads=1)) as engine:
        with raises("onnxruntime-failed", "context_tokens"):
            engine.generate([[3] * 250], Sampling(40, ()))
        assert len(engine.generate([[3, 4]], Sampling(4, ()))[0].ids) == 4, (
            "the engine goes on working"
        )


def test_a_bundle_whose_graph_is_gone_or_a_link_outwards_is_refused(tmp_path: Path) -> None:
    bundle = make_onnx_bundle(tmp_path)
    data = bundle / "onnx" / "model.onnx.data"
    shutil.move(data, tmp_path / "elsewhere.data")
    with raises("bundle-file-missing", "model.onnx.data"):
        load(bundle)
    data.symlink_to(tmp_path / "elsewhere.data")
    with raises("path-outside-bundle", "model.onnx.data"):
        load(bundle)


def test_packed_files_of_another_bundle_are_refused(tmp_path: Path) -> None:
    """They are compared with the manifest before they are loaded."""
    bundle = make_onnx_bundle(tmp_path)
    edit_json(bundle / "racdeploy.json", artifacts=_with_packing(bundle, "bitmask_graph"))
    load(bundle).close()
    data = bundle / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with raises("differs-from-manifest", "model.onnx.data"):
        load(bundle)


def _with_packing(bundle: Path, packing: str) -> list[dict[str, object]]:
    (entry,) = json.loads((bundle / "racdeploy.json").read_text())["artifacts"]
    return [{**entry, "packing": packing}]


def _move_data(bundle: Path, change: Callable[[onnx.ModelProto], None], *made: str) -> None:
    """Change the graph of a bundle, write further files, and renew the hashes of the listed."""
    graph = bundle / "onnx/model.onnx"
    edit(graph, change)
    for name in made:
        (graph.parent / name).parent.mkdir(exist_ok=True)
        (graph.parent / name).write_bytes(bytes(1 << 16))

    (entry,) = json.loads((bundle / "racdeploy.json").read_text())["artifacts"]
    for name in entry["files"]:
        entry["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    entry["sha256"] = entry["files"][entry["path"]]
    edit_json(bundle / "racdeploy.json", artifacts=[entry])


def _external(location: str, name: str = "hidden") -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=[4], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"offset": "0", "location": location, "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_initializer(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.initializer.append(tensor)


def _in_attribute(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], value=tensor))


def _in_subgraph(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    constant = helper.make_node("Constant", [], ["inner"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [], initializer=[tensor])
    proto.graph.node.append(helper.make_node("If", ["c"], [], then_branch=branch))


def _in_function(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    nodes = [helper.make_node("Constant", [], ["y"], value=tensor)]
    made = helper.make_function("own", "F", [], ["y"], nodes, [helper.make_opsetid("", 17)])
    proto.functions.append(made)


def _in_sparse(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[9]))


PLACES = (_in_initializer, _in_attribute, _in_subgraph, _in_function, _in_sparse)


@pytest.mark.parametrize("put", PLACES)
@pytest.mark.parametrize(
    "location",
    ["w.bin", "./w.bin", "sub/w.bin", "model.onnx.data\0x", "../onnx/w.bin", "", "x" * 9000],
)
def test_weights_in_a_file_that_is_not_listed_are_refused(
    tmp_path: Path, put: Callable[[onnx.ModelProto, onnx.TensorProto], None], location: str
) -> None:
    """Wherever the graph keeps them, and whatever the file's name is; the engine never starts."""
    bundle = make_onnx_bundle(tmp_path)
    _move_data(bundle, lambda proto: put(proto, _external(location)), "w.bin", "sub/w.bin")
    with raises("file-not-listed", "manifest does not list it"):
        load(bundle)
    with raises("file-not-listed"):
        inspect_path(bundle)


def test_a_name_hidden_from_one_reader_is_found(tmp_path: Path) -> None:
    """Numbers written longer than they need be, a value before its key, a key twice."""
    graph = tmp_path / "m.onnx"
    entry = b"\x12\x05w.bin\x0a\x05other\x0a\x88\x80\x00location\x18\x01"
    tensor = b"\xea\x00" + bytes([len(entry) | 128, 0]) + entry
    content = b"\x2a" + bytes([len(tensor)]) + tensor
    graph.write_bytes(b"\x08\x08" + b"\x3a\x00" + b"\x3a" + bytes([len(content)]) + content)
    proto = onnx.load(graph, load_external_data=False)
    assert {e.key: e.value for e in proto.graph.initializer[0].external_data} == {
        "location": "w.bin"
    }
    assert {"w.bin"} == find_data_files(graph)


def test_every_message_that_leads_to_a_tensor_is_entered() -> None:
    """Compared with onnx's own description of the format."""
    names = {
        "model": "Model", "training": "TrainingInfo", "function": "Function", "graph": "Graph",
        "node": "Node", "attribute": "Attribute", "sparse": "SparseTensor", "tensor": "Tensor",
    }  # fmt: skip
    key_by_type = {f"{name}Proto": key for key, name in names.items()}

    pending, seen = [onnx.ModelProto.DESCRIPTOR], set()
    while pending:
        described = pending.pop()
        seen.add(described.name)
        inner = {field.number: field.message_type for field in described.fields}
        leading = {
            number: key_by_type[kind.name]
            for number, kind in inner.items()
            if kind is not None and kind.name in key_by_type
        }
        key = key_by_type.get(described.name)
        entered = {n: m for n, m in MESSAGES.get(str(key), {}).items() if m != "entry"}
        assert entered == leading, described.name
        pending += [kind for kind in inner.values() if kind is not None and kind.name not in seen]

    assert key_by_type.keys() <= seen


GRAPHS = {
    "nothing": b"",
    "zeros": bytes(1000),
    "a number without end": b"\x3a" + b"\xff" * 20,
    "beyond the file": b"\x3a\x7f",
    "a field of number 2^30": b"\xfa\xff\xff\xff\xff\x01\x00",
    "5 million fields": b"\x3a\x84\xad\xe2\x04" + b"\x0a\x00" * 5_000_000,
    "a group": b"\x3b\x3c",
    "ORT": b"\x18\x00\x00\x00ORTM" + bytes(64),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_any_bytes_is_refused_before_the_engine(tmp_path: Path, name: str) -> None:
    """In bounded time."""
    (tmp_path / "m.onnx").write_bytes(GRAPHS[name])
    with raises("damaged-onnx", "m.onnx"):
        find_data_files(tmp_path / "m.onnx")


def test_a_graph_of_onnxruntimes_own_format_is_refused(model: Path) -> None:
    with raises("no-onnx-file", "model.ort"):
        opened(model.rename(model.with_suffix(".ort")))


def test_a_part_of_a_split_model_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    """llama.cpp finds it by the name of the first."""
    bundle = make_bundle(tmp_path)
    (entry,) = json.loads((bundle / "racdeploy.json").read_text())["artifacts"]
    name = "model-00001-of-00002.gguf"
    (bundle / entry["path"]).rename(bundle / name)
    entry |= {"path": name, "files": {name: entry["sha256"]}}
    edit_json(bundle / "racdeploy.json", artifacts=[entry])
    with raises("file-not-listed", "model-00002-of-00002.gguf"):
        load(bundle)
