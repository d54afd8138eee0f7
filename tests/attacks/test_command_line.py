"""The worst of each kind as a user meets it: a command, one line, and a bad file's exit code."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.files.writing import file_sha256
from racdeploy.packing.packers import bitmask
from tests.support.tiny_artifacts import make_bundle, make_onnx_bundle
from tests.support.tiny_gguf import random_rows, write_gguf
from tests.support.tiny_models import make_checkpoint

REFUSED = (2, 4)
MANIFEST = "racdeploy.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy thing of each kind."""
    folder = tmp_path_factory.mktemp("made")
    make_bundle(folder / "gguf")
    (folder / "onnx").mkdir()
    make_onnx_bundle(folder / "onnx")
    make_checkpoint(folder / "model", "qwen3")

    rows = random_rows("q8_0", 16, 256, 0.5)
    plain = write_gguf(folder / "m.gguf", {"w": ("q8_0", rows)})
    bitmask.pack_file(plain, folder / "m.racgguf")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def _run(*command: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, command)))
    assert "Traceback" not in done.output
    assert "where it should not" not in done.output
    return done.exit_code, done.output


def _is_refused(*command: object) -> None:
    code, said = _run(*command)
    assert code in REFUSED, said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1, said
    assert 20 < len(errors[0]) < 3000
    others = [line for line in said.splitlines() if line.strip() and line not in errors]
    assert len(others) <= 3, said  # what was begun, and the remedy


def _relist(bundle: Path, name: str) -> None:
    """Give a changed file its hash in the manifest, as its author would."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    sha256 = file_sha256(bundle / name)
    for part in (*manifest["artifacts"], manifest["tokenizer"]):
        if name in part["files"]:
            part["files"][name] = sha256
        if part.get("path") == name:
            part["sha256"] = sha256
            part["size_bytes"] = 0
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def _set_template(bundle: Path, template: str) -> None:
    file = bundle / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"chat_template": template}))
    _relist(bundle, file.name)


def _set_tokenizer(bundle: Path, **changes: object) -> None:
    file = bundle / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    _relist(bundle, file.name)


def _set_manifest(bundle: Path, **changes: object) -> None:
    file = bundle / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["generation"] |= changes
    file.write_text(json.dumps(manifest))


def _set_tag(bundle: Path, tag: str) -> None:
    file = bundle / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["tokenizer"]["close_tag"] = tag
    file.write_text(json.dumps(manifest))


def _replace(step: str, content: str) -> dict[str, object]:
    one = {"type": "Replace", "pattern": {"String": step}, "content": content}
    return {"type": "Sequence", "normalizers": [one] * 34}


BUNDLES: dict[str, Callable[[Path], object]] = {
    "a manifest of NUL": lambda b: (b / MANIFEST).write_bytes(b"\0" * 10**6),
    "a deep manifest": lambda b: (b / MANIFEST).write_bytes(b"[" * 10**5),
    "a manifest of 5 MB": lambda b: (b / MANIFEST).write_bytes(b" " * 5 * 10**6 + b"{}"),
    "a context beyond memory": lambda b: _set_manifest(b, context_tokens=10**30),
    "a tag of 30 kB": lambda b: _set_tag(b, "x" * 30_000),
    "a template that is folded": lambda b: _set_template(b, "{{ '%700000000d' % 1 }}"),
    "an endless template": lambda b: _set_template(
        b, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a tokenizer that grows": lambda b: _set_tokenizer(b, normalizer=_replace("e", "ee")),
    "a tokenizer that panics": lambda b: _set_tokenizer(
        b, model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}
    ),
    "a link for a template": lambda b: (b / "chat_template.jinja").symlink_to("/etc/passwd"),
}


@pytest.mark.answers("M1", "M2", "M3", "M5", "L1")
@pytest.mark.parametrize("command", ["run", "verify"])
@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.takes(6, "a healthy engine is loaded, too, and a template may take a second")
def test_a_bundle(place: Path, name: str, command: str) -> None:
    bundle = place / "gguf/bundle"
    BUNDLES[name](bundle)
    _is_refused(command, bundle, *(["What is 2 + 2?"] if command == "run" else []))


@pytest.mark.takes(12, "healthy ones, each by an engine")
def test_what_is_healthy_is_not_refused(place: Path) -> None:
    """The cases above and below fail for what was done to them."""
    for kind in ("gguf", "onnx"):
        code, said = _run("run", place / kind / "bundle", "What is 2 + 2?")
        assert code == 0, said
    for name in ("m.gguf", "m.racgguf", "model", "gguf/bundle"):
        assert _run("inspect", place / name)[0] == 0
    assert _run("unpack", place / "m.racgguf", "--out", place / "unpacked.gguf")[0] == 0


@pytest.mark.answers("M4", "L1")
@pytest.mark.takes(6, "a healthy engine is loaded, too")
@pytest.mark.parametrize(
    "lines",
    [b"\0" * 10**6, b"[]\n", b'{"question": "' + b"x" * 2 * 10**6 + b'"}\n', b'{"a": "\\ud800"}\n'],
    ids=["NUL", "a list", "a long line", "half a character"],
)
def test_records(place: Path, lines: bytes) -> None:
    bundle = place / "gguf/bundle"
    (bundle / "records.jsonl").write_bytes(lines)
    _is_refused("verify", bundle)


def _put(file: Path, place: int, code: str, value: int) -> None:
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{code}", data, place, value)
    file.write_bytes(data)


@pytest.mark.parametrize("place_and_value", [(8, 2**64 - 1), (16, 2**63), (24, 2**64 - 8), (4, 9)])
def test_a_gguf(place: Path, place_and_value: tuple[int, int]) -> None:
    where, value = place_and_value
    _put(place / "m.gguf", where, "I" if where == 4 else "Q", value)
    _is_refused("inspect", place / "m.gguf")


@pytest.mark.takes(6, "llama.cpp is started")
@pytest.mark.parametrize("where", [8, 16, 24])
def test_a_gguf_of_a_bundle_that_its_author_has_hashed(place: Path, where: int) -> None:
    """llama.cpp gets it, and may abort: in a process of its own."""
    bundle = place / "gguf/bundle"
    _put(bundle / "model.gguf", where, "Q", 2**62)
    _relist(bundle, "model.gguf")
    _is_refused("run", bundle, "hi")


@pytest.mark.parametrize(
    ("command", "where"),
    [*(("unpack", where) for where in (8, 16, 24, -40, -9)), ("inspect", 8), ("inspect", 24)],
)
def test_a_container(place: Path, where: int, command: str) -> None:
    """What is wrong in its planes is found when they are unpacked."""
    file = place / "m.racgguf"
    data = bytearray(file.read_bytes())
    data[where:] = data[where:][:1] * len(data[where:]) if where < 0 else b"\xff" * 64
    file.write_bytes(data)
    _is_refused(command, file)


@pytest.mark.takes(8, "onnxruntime is started")
@pytest.mark.parametrize("kind", ["no graph", "outside", "half"])
def test_a_graph(place: Path, kind: str) -> None:
    bundle = place / "onnx/bundle"
    graph = bundle / "onnx/model.onnx"
    if kind == "no graph":
        graph.write_bytes(b"\x08\x09" * 400)
    elif kind == "half":
        graph.write_bytes(graph.read_bytes()[:-500])
    else:
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../../../secret"
        graph.write_bytes(model.SerializeToString())
    _relist(bundle, "onnx/model.onnx")
    _is_refused("run", bundle, "hi")


@pytest.mark.answers("M10", "L1")
@pytest.mark.parametrize(
    "text",
    [
        "prune = [[[[",
        "[verify]\nsamples = 1000000000\n",
        "[traces]\nserver = 'http://evil/v1'\nserver_key_env = 'CLOUD_SECRET'\n",
        '[prune]\nsparsity = "\\u0000"\n',
        "a = " + "[" * 5000,
        "[traces]\ncount = " + "9" * 5000,
        "gate" + ".a" * 20_000 + " = 1",
    ],
    ids=["brackets", "samples", "a secret", "NUL", "deep", "digits", "a long key"],
)
def test_a_recipe(place: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "s3cr3t")
    (place / "recipe.toml").write_text(text)
    _is_refused("build", place / "model", "--recipe", place / "recipe.toml", "--dry-run")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000], ids=["digits", "brackets"])
@pytest.mark.parametrize("key", ["traces.count", "gate" + ".a" * 2000], ids=["count", "long"])
def test_an_assignment(value: str, key: str) -> None:
    _is_refused("build", "--set", f"{key}={value}", "--dry-run")


def _set_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
        b'{"a":{},"a":{}}',
        b"[" * 10**5,
        b'{"a":[' + b"[]," * 2 * 10**6 + b"[]]}",
    ],
    ids=["a product that wraps", "a key twice", "deep", "2 million lists"],
)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_weights(place: Path, tmp_path: Path, header: bytes, command: str) -> None:
    _set_header(place / "model/model.safetensors", header)
    more = ["--quant", "q8_0", "--out", tmp_path / "out"] if command == "export" else []
    _is_refused(command, place / "model", *more)


def test_an_export_over_the_weights_that_it_reads(place: Path) -> None:
    weights = place / "model/model.safetensors"
    before = weights.read_bytes()
    _is_refused("export", place / "model", "--out", weights)
    assert weights.read_bytes() == before


@pytest.mark.answers("L1")
@pytest.mark.parametrize("path", ["x" * 2000, "/dev/zero", "."])
@pytest.mark.parametrize("command", ["inspect", "unpack", "verify"])
def test_a_path(place: Path, monkeypatch: pytest.MonkeyPatch, path: str, command: str) -> None:
    monkeypatch.chdir(place)
    _is_refused(command, path)


@pytest.mark.answers("L1")
@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"], ids=["NUL", "half a character"])
@pytest.mark.parametrize("command", ["inspect", "unpack", "verify"])
def test_a_path_that_no_system_has(path: str, command: str) -> None:
    """The parser of the command line says so, in a frame."""
    code, said = _run(command, path)
    assert code == 2
    assert said.count("Invalid value for") == 1
