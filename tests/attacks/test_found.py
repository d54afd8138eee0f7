"""What fuzzing found, by what was wrong; the inputs themselves are in tests/fuzz/mended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors import SafetensorError, deserialize

from racdeploy.bundles.inspect import inspect_path
from racdeploy.engines.backends.server.http import Client
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.toml import validate
from racdeploy.manifest import MANIFEST_NAME, Manifest
from racdeploy.models.bpe import BytePairs
from racdeploy.models.tokenizer_files import TokenizerFiles
from racdeploy.quant.importance import Importance
from racdeploy.recipe import Recipe
from racdeploy.runtime.template import ChatTemplate
from racdeploy.sandbox.client import Sandbox
from racdeploy.sandbox.pipe import AnswerPipe
from racdeploy.tensors.safetensors import read_tensor_entries
from tests.support.completion_server import Reply, serving
from tests.support.errors import raises
from tests.support.fake_bundle import make_fake_bundle

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _weights(header: str, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + body


WEIGHTS = {
    "a gap": _weights(json.dumps({"a": {**ENTRY, "data_offsets": [4, 12]}}), bytes(12)),
    "bytes behind": _weights(json.dumps({"a": ENTRY}), bytes(9)),
    "no tensor, but bytes": _weights("{}", bytes(4)),
    "metadata of numbers": _weights(json.dumps({"__metadata__": {"a": 1}, "a": ENTRY}), bytes(8)),
    "metadata that is none": _weights(json.dumps({"__metadata__": 0, "a": ENTRY}), bytes(8)),
    "not a number": _weights('{"__metadata__": NaN}', b""),
    "not a number in a tensor": _weights(json.dumps({"a": {**ENTRY, "b": float("nan")}}), bytes(8)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_the_reference_library_refuses(tmp_path: Path, name: str) -> None:
    """It is asked, too: what it would take is no case."""
    file = tmp_path / "m.safetensors"
    file.write_bytes(WEIGHTS[name])
    with pytest.raises(SafetensorError):
        deserialize(WEIGHTS[name])
    with raises("damaged-safetensors", str(file)):
        read_tensor_entries(file)


def test_weights_of_a_type_with_a_line_end(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(_weights(json.dumps({"a": {**ENTRY, "dtype": "F\n32"}}), bytes(8)))
    with raises("unsupported-dtype") as caught:
        read_tensor_entries(file)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("key", ["a\nerror: all is well", "x" * 100_000])
def test_a_key_of_a_manifest_or_recipe_is_shown_in_one_line(tmp_path: Path, key: str) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    values = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(values | {key: 1}))
    with pytest.raises(ArtifactError) as caught:
        Manifest.read(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000

    with pytest.raises(UsageError) as refused:
        validate(Recipe, {f"{key}{number}": 1 for number in range(100)}, "racdeploy.json")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 3000
    assert "and 92 more" in refused.value.message


def test_a_file_name_that_no_system_takes(tmp_path: Path) -> None:
    folder = make_fake_bundle(tmp_path / "bundle")
    values = json.loads((folder / MANIFEST_NAME).read_text())
    values["tokenizer"]["files"]["x" * 1000] = "0" * 64
    (folder / MANIFEST_NAME).write_text(json.dumps(values))
    with raises("bundle-file-missing", "x" * 1000):
        Manifest.read(folder)


def _graph(*initializers: TensorProto, tensors: object = ()) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [value], [value], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    helper.set_model_props(model, {"racdeploy.tensors": json.dumps(tensors)})
    return model


def _values(dims: list[int], kind: int = TensorProto.UINT8, **fields: Any) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=kind, **fields)


def _outside(dims: list[int], kind: int = TensorProto.UINT8, **places: str) -> TensorProto:
    values = _values(dims, kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "m.data", **places}.items():
        values.external_data.add(key=key, value=value)
    return values


LISTED = {"name": "w", "shape": [2, 64], "quant": "f32", "is_embedding": False}
BLOCKS = {**LISTED, "quant": "matmulnbits_8"}
MASKED = {**LISTED, "packing": "bitmask_graph"}
SCALES = TensorProto(name="w.scales", dims=[2, 4], data_type=TensorProto.FLOAT, raw_data=bytes(32))
GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "a list that is none": lambda: _graph(tensors=7),
    "a key with a line end": lambda: _graph(tensors=[{**LISTED, "a\nb": 1}]),
    "a name in numbers": lambda: _graph(tensors=[{**LISTED, "name": 7}]),
    "a shape in words": lambda: _graph(tensors=[{**LISTED, "shape": ["2", "64"]}]),
    "a shape of halves": lambda: _graph(tensors=[{**LISTED, "shape": [2.5, 64]}]),
    "a shape of 2^80": lambda: _graph(tensors=[{**LISTED, "shape": [2**40, 2**40]}]),
    "negative dimensions": lambda: _graph(_values([-1, -4], raw_data=bytes(4))),
    "dimensions of nothing": lambda: _graph(_values([0, 2**62])),
    "dimensions that no bytes hold": lambda: _graph(_values([2**40], TensorProto.FLOAT)),
    "an unknown type": lambda: _graph(_values([4], 29, raw_data=bytes(4))),
    "no type": lambda: _graph(_outside([4], TensorProto.UNDEFINED)),
    "NUL in a place": lambda: _graph(_outside([4], location="a\0b")),
    "a long place": lambda: _graph(_outside([4], location="a" * 1000)),
    "negative dimensions in a file": lambda: _graph(_outside([-1, -4], length="4")),
    "a mask of floats": lambda: _graph(
        TensorProto(name="w.mask", dims=[4], data_type=TensorProto.FLOAT, raw_data=bytes(16)),
        TensorProto(name="w.values", dims=[1], data_type=TensorProto.FLOAT, raw_data=bytes(4)),
        tensors=[MASKED],
    ),
    "a mask of other weights": lambda: _graph(
        TensorProto(name="w.mask", dims=[2], data_type=TensorProto.UINT8, raw_data=bytes(2)),
        TensorProto(name="w.values", dims=[1], data_type=TensorProto.FLOAT, raw_data=bytes(4)),
        tensors=[{**MASKED, "shape": [2**19, 2**20]}],
    ),
    "codes of floats": lambda: _graph(
        _values([2, 16], TensorProto.FLOAT, raw_data=bytes(128)), SCALES, tensors=[BLOCKS]
    ),
    "scales of other blocks": lambda: _graph(
        _values([2, 60], raw_data=bytes(120)), SCALES, tensors=[BLOCKS]
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_lies_about_its_tensors(tmp_path: Path, name: str) -> None:
    file = tmp_path / "m.onnx"
    (tmp_path / "m.data").write_bytes(bytes(4))
    file.write_bytes(GRAPHS[name]().SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        inspect_path(file)
    assert "\n" not in caught.value.message


def test_a_name_in_a_graph_that_is_no_text(tmp_path: Path) -> None:
    """Protobuf hands it over as bytes."""
    file = tmp_path / "m.onnx"
    whole = _graph(_values([4], raw_data=bytes(4))).SerializeToString()
    file.write_bytes(whole.replace(b"B\x01w", b"B\x01\xb0"))
    with raises("names-not-utf8", str(file)):
        inspect_path(file)


def test_a_server_that_repeats_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an answer as in an error: whatever quotes it has no key to show."""
    monkeypatch.setenv("SERVER_KEY", "s3cr3t")
    said = {"choices": [{"finish_reason": "s3cr3t"}], "s3cr3t": "no s3cr3t"}
    with serving({"v1/models": lambda _: said}) as url:
        assert "s3cr3t" not in json.dumps(Client(url, "SERVER_KEY", 5.0).ask("models"))

    with serving({"v1/models": lambda _: Reply({"no": "s3cr3t"}, 404)}) as url:
        with pytest.raises(EngineError) as caught:
            Client(url, "SERVER_KEY", 5.0).ask("models")
        assert "s3cr3t" not in str(caught.value)


def note_timeouts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the seconds of every answer that is waited for in vain."""
    waited: list[float] = []
    receive = AnswerPipe.receive

    def note(pipe: AnswerPipe, timeout_s: float) -> Any:
        try:
            return receive(pipe, timeout_s)
        except TimeoutError:
            waited.append(timeout_s)
            raise

    monkeypatch.setattr(AnswerPipe, "receive", note)
    return waited


def test_a_template_behind_one_that_fails_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one began with the process, which had answered for it already."""
    reader = Sandbox("racdeploy.sandbox.text_operations")
    try:
        # Not with our raises: its frame would keep the traceback, and so the template, alive.
        broken = ChatTemplate("{{ 7 3 }}", sandbox=reader)
        with pytest.raises(ArtifactError, match="TemplateSyntaxError"):
            broken.render([])
        with pytest.raises(ArtifactError, match="TemplateSyntaxError"):
            broken.render([])
        del broken

        waited = note_timeouts(monkeypatch)
        assert ChatTemplate("{{ 1 + 1 }}", sandbox=reader).render([]) == "2"
        assert waited == []
    finally:
        reader.close()


def test_a_template_says_what_is_wrong_in_one_line() -> None:
    reader = Sandbox("racdeploy.sandbox.text_operations")
    try:
        template = ChatTemplate("{{ raise_exception('no\\nerror: yes') }}", sandbox=reader)
        with raises("template-failed", "no error: yes") as caught:
            template.render([])
        assert "\n" not in caught.value.message
    finally:
        reader.close()


TOKENIZERS: dict[str, dict[str, Any]] = {
    "no model": {"model": None},
    "a model in words": {"model": "BPE"},
    "a type with a line end": {"model": {"type": "a\nb"}},
    "steps in numbers": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 7}},
    "no merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": None}},
    "merges in numbers": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
    "a merge of three": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
    "a vocabulary of texts": {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": ["a a"]}},
    "added tokens in numbers": {"added_tokens": 7},
    "an added token in words": {"added_tokens": ["<t>"]},
    "an added token without id": {"added_tokens": [{"content": "<t>"}]},
    "an added token of half an id": {"added_tokens": [{"content": "<t>", "id": 0.5}]},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_of_other_kinds(tmp_path: Path, name: str) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a"]}
    values = {"model": model, "added_tokens": [], **TOKENIZERS[name]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises((ArtifactError, UsageError)) as caught:
        BytePairs.read(TokenizerFiles(tmp_path))
    assert "\n" not in caught.value.message


def test_an_importance_beyond_all_numbers_is_refused_in_silence(tmp_path: Path) -> None:
    """Numpy's warning would be a second line."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_tensor("w.weight.in_sum2", np.full((1, 8), 1e38, np.float32))
    writer.add_tensor("w.weight.counts", np.full((1, 1), 1e-30, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with raises("importance-not-finite", "'w.weight'"):
        Importance.read(file)
