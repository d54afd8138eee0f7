"""What a stranger writes into the text files of a bundle or a model folder: one line says so.

Each case is over within two seconds and takes less than 300 MB, whatever the file says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.errors import ArtifactError, ModelError
from racdeploy.files.reading import artifact_errors
from racdeploy.files.toml import validate
from racdeploy.manifest import MANIFEST_NAME, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Verification
from racdeploy.report.files import read_records, read_report
from tests.support.errors import raises
from tests.support.fake_bundle import make_fake_bundle
from tests.support.peak_memory import bounded
from tests.support.tiny_models import make_checkpoint

pytestmark = pytest.mark.answers("M3", "L1")

Edit = Callable[[dict[str, Any]], object]
NUL, SURROGATE = "a\0b", "a\ud800b"
WRONG: tuple[Any, ...] = ("x", [], {}, -2, 10**30, 10**400, 1.5, [[1]], {"a": {"b": {}}})

BYTES = {
    "nothing": b"",
    "half": b'{"schema_version": 1',
    "a list": b"[]",
    "null": b"null",
    "two values": b"{} {}",
    "UTF-16": "{}".encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "no UTF-8": b'{"a": "\xff"}',
    "NUL": b"\0" * 1000,
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"verdict": "pass", "verdict": "fail"}',
    "a key twice behind others": b'{%b"x":0,"x":0}'
    % b"".join(b'"%d":0,' % i for i in range(50_000)),
    "half a character": rb'{"verdict": "\ud800"}',
    "5 MB": b" " * 5_000_000 + b"{}",
    "20 MB": b" " * 20_000_000 + b"{}",
    "2 million lists": b'{"a": [' + b"[]," * 2_000_000 + b"[]]}",
}


def _set(*path: Any, to: Any) -> Edit:
    """Return what sets a value at the end of a path of keys."""

    def edit(values: dict[str, Any]) -> None:
        *way, last = path
        place: Any = values
        for key in way:
            place = place[key]
        place[last] = to

    return edit


def _numbers(part: str, keys: tuple[str, ...]) -> dict[str, Edit]:
    wrong = (-1, 10**30, 10**400, 1.5, "many", [1])
    return {
        f"{part}.{key} is {str(value)[:12]}": _set(part, key, to=value)
        for key in keys
        for value in wrong
    }


MANIFESTS: dict[str, Edit] = {
    **_numbers(
        "generation",
        ("max_new_tokens", "context_tokens", "model_context_tokens", "max_thinking_tokens"),
    ),
    "no artifact": _set("artifacts", to=[]),
    "no manifest's artifact": _set("artifacts", to=[{}]),
    "65 artifacts": lambda values: values.update(artifacts=values["artifacts"] * 65),
    "a file of 10 TB": _set("artifacts", 0, "size_bytes", to=10**13),
    "a file of 10^400 bytes": _set("artifacts", 0, "size_bytes", to=10**400),
    "a file of -1 bytes": _set("artifacts", 0, "size_bytes", to=-1),
    "no hash": _set("artifacts", 0, "sha256", to="0"),
    "a hash that is none": _set("artifacts", 0, "sha256", to="x" * 64),
    "another hash": _set("artifacts", 0, "sha256", to="0" * 64),
    "1,025 files": _set("artifacts", 0, "files", to={f"f{i}": "0" * 64 for i in range(1025)}),
    "an unknown key": _set("surprise", to=1),
    "another schema": _set("schema_version", to=3),
    "2,000 ends": _set("tokenizer", "eos_ids", to=list(range(2000))),
    "an end that is none": _set("tokenizer", "eos_ids", to=["x"]),
    "hot": _set("generation", "temperature", to=1e999),
    "no temperature": _set("generation", "temperature", to=float("nan")),
    "a penalty without end": _set("generation", "thinking", to={"hesitation_penalty": 1e999}),
    "zeros in words": _set("pruning", to={"sparsity": "most"}),
    "more zeros than weights": _set("pruning", to={"sparsity_file": 3.0}),
    "a model in numbers": _set("base", to={"model": 7}),
    "files in numbers": _set("base", to={"files": 7}),
    "a headline in words": _set("headline", to={"dense": "good"}),
}
PATHS = ("", "..", "../secret", "/etc/passwd", NUL, "a\nb", "x" * 2000, "missing", "onnx", "~", ".")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


def _is_refused(*command: str) -> None:
    """Run a command as a user does; it ends with one line and the exit code of a wrong file."""
    with bounded():
        done = CliRunner().invoke(app, list(command))
    assert done.exit_code == 2, done.output
    assert done.output.count("error:") == 1
    assert "Traceback" not in done.output
    assert len(done.output) < 2500


@pytest.mark.parametrize("name", BYTES)
def test_a_manifest_of_any_bytes(bundle: Path, name: str) -> None:
    (bundle / MANIFEST_NAME).write_bytes(BYTES[name])
    _is_refused("inspect", str(bundle))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_says_anything(bundle: Path, name: str) -> None:
    values = json.loads((bundle / MANIFEST_NAME).read_text())
    MANIFESTS[name](values)
    (bundle / MANIFEST_NAME).write_text(json.dumps(values))
    with bounded(), pytest.raises(ArtifactError):
        Manifest.read(bundle)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("part", ["artifact", "file", "tokenizer"])
def test_a_path_that_is_none_of_the_bundle(bundle: Path, path: str, part: str) -> None:
    values = json.loads((bundle / MANIFEST_NAME).read_text())
    entry = values["artifacts"][0]
    if part == "artifact":
        entry["files"][path] = entry["files"].pop(entry["path"])
        entry["path"] = path
    elif part == "file":
        entry["files"][path] = "0" * 64
    else:
        values["tokenizer"]["files"][path] = "0" * 64

    (bundle / MANIFEST_NAME).write_text(json.dumps(values))
    _is_refused("inspect", str(bundle))


def test_a_manifest_that_is_no_file(bundle: Path) -> None:
    """A pipe would wait for somebody who writes."""
    (bundle / MANIFEST_NAME).unlink()
    os.mkfifo(bundle / MANIFEST_NAME)
    _is_refused("inspect", str(bundle))

    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).symlink_to("/dev/zero")
    _is_refused("inspect", str(bundle))


@pytest.mark.parametrize("length", [1, 2])
def test_a_path_that_is_a_loop_of_links(bundle: Path, length: int) -> None:
    """One that leads to itself, and two that lead to each other."""
    (bundle / "a").symlink_to("b" if length == 2 else "a")
    (bundle / "b").symlink_to("a")
    values = json.loads((bundle / MANIFEST_NAME).read_text())
    values["tokenizer"]["files"]["a"] = "0" * 64
    (bundle / MANIFEST_NAME).write_text(json.dumps(values))
    _is_refused("inspect", str(bundle))


@pytest.mark.parametrize("name", BYTES)
def test_records_and_a_report_of_any_bytes(bundle: Path, name: str) -> None:
    for file, read in (("records.jsonl", read_records), ("report.json", read_report)):
        (bundle / file).write_bytes(BYTES[name] or b"\n")
        with bounded(), pytest.raises(ArtifactError):
            read(bundle)


def test_a_line_and_a_number_of_records_have_bounds(bundle: Path) -> None:
    file = bundle / "records.jsonl"
    file.write_bytes(b'{"question": "' + b"x" * 2_000_000 + b'"}\n')
    with bounded(), raises("file-too-large", "1,000,000 bytes"):
        read_records(bundle)

    with file.open("wb") as stream:  # 40 GB that take no space
        stream.truncate(40_000_000_000)
    with bounded(), pytest.raises(ArtifactError):
        read_records(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 10**9, "temperature": 0.6},
        {"context_tokens": 10**8},
        {"parallel": 10**6},
        {"count": 10**12},
        {"max_new_tokens": 10**10},
        {"temperature": float("inf")},
        {"logit_traces": 10**9},
    ],
    ids=str,
)
def test_a_recipe_in_a_bundle_has_bounds(change: dict[str, Any]) -> None:
    with raises("invalid-settings", next(iter(change))):
        validate(Verification, change, "racdeploy.json")


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_model_folder_of_any_bytes(model: Path, tmp_path: Path, file: str, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for each in model.iterdir():
        (folder / each.name).symlink_to(each)

    (folder / file).unlink(missing_ok=True)
    (folder / file).write_bytes(BYTES[name])
    _is_refused("inspect", str(folder))


SETTINGS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("layer_types", "sliding_window", "hidden_act", "eos_token_id", "model_type"),
)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_config_that_says_anything(model: Path, tmp_path: Path, key: str) -> None:
    """Every kind of value that is not the setting's; nothing is computed from it."""
    config = json.loads((model / "config.json").read_text())
    allowed = {
        "rope_scaling": ({}, {"a": {"b": {}}}),
        "rope_parameters": ({},),
        "rms_norm_eps": (-2, 1.5),
        "rope_theta": (-2, 1.5),
        "layer_types": ([],),
        "eos_token_id": ([],),
        "hidden_act": ("x",),
        "model_type": (),
    }.get(key, ())

    for value in WRONG:
        if value in allowed:
            continue
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with bounded(), pytest.raises(ModelError):
            Checkpoint(tmp_path)


def _header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def _tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


WEIGHTS = {
    "overlap": _header(a=_tensor([4], 0, 16), b=_tensor([4], 8, 24)),
    "the same bytes": _header(a=_tensor([4], 0, 16), b=_tensor([4], 0, 16)),
    "a product that wraps": _header(a=_tensor([2**32, 2**32], 0, 0)),
    "a product of nothing": _header(a=_tensor([0, 2**62], 0, 0)),
    "a negative axis": _header(a=_tensor([-1, -4], 0, 16)),
    "many axes": _header(a=_tensor([1] * 64 + [4], 0, 16)),
    "beyond the file": _header(a=_tensor([1024], 0, 4096)),
    "backwards": _header(a=_tensor([4], 16, 0)),
    "before the header's end": _header(a=_tensor([4], -16, 0)),
    "an unknown type": _header(a=_tensor([4], 0, 16, "Q9")),
    "a number as tensor": _header(a=7),
    "a key twice": (twice := b'{"a":{},"a":{}}') and len(twice).to_bytes(8, "little") + twice,
    "a header of 10 GB": (10**10).to_bytes(8, "little") + b"{}",
    "no header": b"\0" * 8,
    "2 million lists": (flood := b'{"a":[' + b"[]," * 2_000_000 + b"[]]}")
    and len(flood).to_bytes(8, "little") + flood,
}


@pytest.mark.answers("L9")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_any_header(tmp_path: Path, name: str) -> None:
    """As the reference library refuses them."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(WEIGHTS[name])
    _is_refused("inspect", str(file))


def test_what_a_native_library_raises_is_one_line() -> None:
    class PanicException(BaseException):
        pass

    said = "PanicException: called unwrap on None"
    with raises("damaged-file", "x.json", said), artifact_errors("x.json"):
        raise PanicException("called unwrap\non None")

    with pytest.raises(KeyboardInterrupt), artifact_errors("x.json"):
        raise KeyboardInterrupt
