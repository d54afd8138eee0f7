"""Bundles whose files are not those that the manifest lists: nothing else runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import racdeploy
from racdeploy.bundles.inspect import inspect_path
from racdeploy.files import sha256_cache
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from racdeploy.runtime import loading
from racdeploy.runtime.loading import check_artifact_files
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle, make_onnx_bundle

pytestmark = pytest.mark.answers("M5")

LONG_AGO_NS = 1_600_000_000_000_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, with a cache of its own in which nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read whole, and may be as young as a bundle's are."""
    names = []

    def count(file: Path) -> str:
        names.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr(sha256_cache, "file_sha256", count)
    monkeypatch.setattr(sha256_cache, "_SETTLED_S", -1.0)
    return names


def _check(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    check_artifact_files(bundle, manifest, manifest.artifacts[0])


def _set_hash(bundle: Path, sha256: str) -> None:
    manifest = json.loads((bundle / "racdeploy.json").read_text(encoding="utf-8"))
    entry = manifest["artifacts"][0]
    entry["sha256"] = entry["files"][entry["path"]] = sha256
    (bundle / "racdeploy.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_an_artifact_of_another_hash_does_not_run(bundle: Path) -> None:
    """The application gets the error, not only the command line."""
    _set_hash(bundle, "0" * 64)
    with raises("differs-from-manifest", "model.gguf"):
        racdeploy.load(bundle)


def test_a_second_load_reads_nothing_whole(bundle: Path, hashed: list[str]) -> None:
    """Until the artifact changes, or the manifest says another hash."""
    _check(bundle)
    assert hashed == ["model.gguf"]
    _check(bundle)
    assert hashed == ["model.gguf"]
    _set_hash(bundle, "0" * 64)
    with raises("differs-from-manifest", "model.gguf"):
        _check(bundle)


@pytest.mark.parametrize("place", [0, 70_001, -1])
def test_a_change_after_the_first_load_is_noticed(
    bundle: Path, hashed: list[str], place: int
) -> None:
    """Though size, inode and times are as they were."""
    file = bundle / "model.gguf"
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))
    _check(bundle)
    inode = file.stat().st_ino
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert inode == file.stat().st_ino
    with raises("differs-from-manifest", "model.gguf"):
        _check(bundle)


def test_what_others_could_have_remembered_does_not_count(
    bundle: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that anybody may write, and a record that was damaged."""
    _check(bundle)
    (record,) = (tmp_path / "cache/racdeploy/checked").iterdir()
    record.write_text(record.read_text().replace('"', " ", 1))
    _check(bundle)
    assert len(hashed) == 2
    monkeypatch.setattr(sha256_cache, "open_private", _refuse)
    monkeypatch.setattr(sha256_cache, "explain_not_private", lambda folder: "others may write")
    _check(bundle)
    assert len(hashed) == 3


def _refuse(file: Path) -> int:
    raise PermissionError("others may write")


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_tokenizer_file_that_is_not_listed_is_refused(bundle: Path, name: str, kind: str) -> None:
    """Dropped in, it would replace what was verified; a link may lead anywhere."""
    listed = Manifest.read(bundle).tokenizer.files
    if name in listed:
        _unlist(bundle, name)
    (bundle / name).unlink(missing_ok=True)
    if kind == "file":
        (bundle / name).write_text("{}")
    else:
        (bundle / name).symlink_to("/etc/passwd")
    with raises("file-not-listed", name):
        racdeploy.load(bundle)
    with raises("file-not-listed", name):
        inspect_path(bundle)


def _unlist(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "racdeploy.json").read_text(encoding="utf-8"))
    del manifest["tokenizer"]["files"][name]
    (bundle / "racdeploy.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.usefixtures("exported")
def test_a_second_graph_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    """It is found by its name."""
    bundle = make_onnx_bundle(tmp_path)
    _check(bundle)
    (bundle / "onnx" / "model.accel.onnx").write_bytes(b"")
    with raises("file-not-listed", "model.accel.onnx"):
        racdeploy.load(bundle)


@pytest.mark.usefixtures("exported")
@pytest.mark.takes(5, "five loads")
def test_a_configuration_that_is_used_is_the_one_that_is_listed(tmp_path: Path) -> None:
    """The graph leaves its head size open; a link, and a manifest that lists none, are no way."""
    bundle = make_onnx_bundle(tmp_path)
    racdeploy.load(bundle).close()

    outside = shutil.copy(bundle / "config.json", tmp_path)
    for make in (shutil.copy, os.symlink):
        make(outside, bundle / "onnx/config.json")
        with raises("file-not-listed", "onnx/config.json"):
            racdeploy.load(bundle)
        (bundle / "onnx/config.json").unlink()

    manifest = json.loads((bundle / "racdeploy.json").read_text(encoding="utf-8"))
    (entry,) = manifest["artifacts"]
    unlisted = {**manifest, "artifacts": [entry | {"companions": {}}]}
    (bundle / "racdeploy.json").write_text(json.dumps(unlisted), encoding="utf-8")
    with raises("file-not-listed", "config.json"):
        racdeploy.load(bundle)
    (bundle / "racdeploy.json").write_text(json.dumps(manifest), encoding="utf-8")

    with (bundle / "config.json").open("a") as stream:
        stream.write("\n")
    with raises("differs-from-manifest", "config.json"):
        racdeploy.load(bundle)


def test_other_files_may_lie_in_a_bundle(bundle: Path) -> None:
    """Notes, a licence, another model: nothing uses them."""
    (bundle / "NOTES.md").write_text("mine")
    (bundle / "other.gguf").write_bytes(b"GGUF")
    _check(bundle)


def test_an_artifact_that_changes_while_it_is_loaded_is_noticed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine read may be neither the old nor the new file."""

    class Engine:
        closed = False

        def close(self) -> None:
            """Note it."""
            self.closed = True

    engine = Engine()

    def open_engine(backend: str, path: Path, settings: Any) -> Engine:
        with path.open("ab") as stream:
            stream.write(b"more")
        return engine

    monkeypatch.setattr(loading.engines, "open_engine", open_engine)
    with raises("artifact-changed", "model.gguf"):
        racdeploy.load(bundle)
    assert engine.closed
