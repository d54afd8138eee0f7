"""Writing whole or not at all, and reading what others may have damaged."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from racdeploy.files.partials import remove_abandoned
from racdeploy.files.writing import atomic_folder, file_sha256, write_atomic
from racdeploy.manifest import MANIFEST_NAME, Manifest
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle

if sys.platform != "win32":
    import fcntl


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    """An error in the middle leaves what was there, and no scratch folder."""
    out = tmp_path / "bundle"
    with atomic_folder(out) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(RuntimeError):
        _fail_in(out)
    assert (out / "a").read_text() == "old"
    assert [out] == list(tmp_path.iterdir())


def _fail_in(out: Path) -> None:
    with atomic_folder(out) as scratch:
        (scratch / "a").write_text("new")
        raise RuntimeError


def test_a_full_disk_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC becomes exit code 4 with what to do, and no file of that name appears."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with raises("write-failed", "No space left", str(tmp_path)) as caught:
        write_atomic(tmp_path / "file", b"data")
    assert "--" not in caught.value.remedy, "the options of one command are not those of another"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_partial_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    """One killed while it writes leaves a file; one that still writes, here or on another machine,
    keeps its own.
    """
    file = tmp_path / "m[1].gguf"
    code = (
        "import sys; from pathlib import Path\n"
        "from racdeploy.files.writing import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(file)]

    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running,
    ):
        for process in (killed, running):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"

        both = set(tmp_path.iterdir())
        assert len(both) == 2
        killed.kill()
        killed.wait()

        others = {tmp_path / name for name in (".m1.gguf.12.partial", ".m[1].gguf.x.partial")}
        for other in others:
            other.write_bytes(b"")

        left = next(path for path in both if not _is_locked(path))
        with left.open("rb") as elsewhere:  # as the process of another machine
            fcntl.flock(elsewhere, fcntl.LOCK_EX)
            remove_abandoned(file)
            assert left.exists()
        remove_abandoned(file)
        assert {*both, *others} - {left} == set(tmp_path.iterdir())
        running.kill()


def _is_locked(path: Path) -> bool:
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_an_artifact_of_several_files_is_checked_whole(bundle: Path, tmp_path: Path) -> None:
    """Every file is there, inside, and has its hash; a manifest without the list still reads."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "model.gguf_data").write_bytes(b"weights")
    manifest = json.loads((copy / "racdeploy.json").read_text(encoding="utf-8"))
    entry = manifest["artifacts"][0]
    assert entry.pop("files") == {"model.gguf": entry["sha256"]}
    (copy / "racdeploy.json").write_text(json.dumps(manifest))
    assert Manifest.read(copy).artifacts[0].files == {"model.gguf": entry["sha256"]}

    def read(files: dict[str, str]) -> Manifest:
        entry["files"] = files
        (copy / "racdeploy.json").write_text(json.dumps(manifest))
        return Manifest.read(copy)

    whole = {
        "model.gguf": entry["sha256"],
        "model.gguf_data": file_sha256(copy / "model.gguf_data"),
    }
    read(whole).check_files(copy)
    with raises("differs-from-manifest", "model.gguf_data"):
        read(whole | {"model.gguf_data": "0" * 64}).check_files(copy)
    with raises("invalid-manifest", "'model.gguf'"):
        read({"model.gguf_data": whole["model.gguf_data"]})
    with raises("path-outside-bundle", "'../model'"):
        read(whole | {"../model": "0" * 64})
    (copy / "model.gguf_data").unlink()
    with raises("bundle-file-missing", "model.gguf_data"):
        read(whole)


def _edited(bundle: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        shutil.copy(file, copy / file.name)
    values = json.loads((bundle / MANIFEST_NAME).read_text()) | changes
    (copy / MANIFEST_NAME).write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../outside"])
def test_a_manifest_cannot_name_files_outside(bundle: Path, tmp_path: Path, path: str) -> None:
    """Paths that leave the bundle are refused, however written."""
    entry = json.loads((bundle / MANIFEST_NAME).read_text())["artifacts"][0] | {"path": path}
    with raises("path-outside-bundle", path):
        Manifest.read(_edited(bundle, tmp_path, artifacts=[entry]))


@pytest.mark.parametrize(
    "changes",
    [
        {"artifacts": []},
        {"surprise": 1},
        {"generation": {"temperature": "hot"}},
        {"base": {"model": "a model without a name"}},
        {"base": {"name": 7}},
        {"base": {"name": "a model", "files": 7}},
        {"pruning": {"sparsity": True}},
        {"pruning": {"sparsity_file": "0.5"}},
        {"headline": {"pruned": 0.5}},
    ],
)
def test_a_damaged_manifest_is_an_error(
    bundle: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Missing parts, unknown keys and wrong types are refused with the place."""
    with raises("invalid-manifest", *changes):
        Manifest.read(_edited(bundle, tmp_path, **changes))


_STRUCTURE = {
    "keep": {"ffn": 0.75},
    "uniform": False,
    "parameters": 900,
    "parameters_dense": 1000,
    "blocks": 1,
    "blocks_dense": 1,
    "key_value_heads": 2,
    "key_value_heads_dense": 2,
    "vocabulary": 64,
    "vocabulary_dense": 64,
    "block_rows": [],
}
_ARM = {
    "accuracy": 0.5,
    "thinking_tokens_mean": 12.5,
    "unclosed": 0,
    "size_bytes": None,
    "tokens_per_s": None,
    "prompts": 60,
}
_COUNTED = _ARM | {"parameters": 900}
_DIFFERENCES = {"drop": 0.0, "length_ratio": None}


@pytest.mark.parametrize("structure", [{}, _STRUCTURE], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "headline",
    [
        {},
        {"dense": _ARM, "pruned": _ARM, **_DIFFERENCES},
        {"dense": _COUNTED, "pruned": _COUNTED, "dense q4_0": _ARM, **_DIFFERENCES},
    ],
    ids=["nothing measured", "two models", "cut, beside a rival"],
)
def test_a_manifest_is_written_with_the_keys_that_it_was_read_with(
    bundle: Path, tmp_path: Path, structure: dict[str, Any], headline: dict[str, Any]
) -> None:
    """The same keys in the same order: programs read them, and signatures are of the bytes."""
    pruning = {
        "method": "sparsegpt",
        "pattern": "unstructured",
        "sparsity": 0.5,
        "requested_sparsity": 0.5,
        "sparsity_file": 0.5,
        "linears": [],
        "structure": structure,
    }
    copy = _edited(bundle, tmp_path, pruning=pruning, headline=headline)
    text = (copy / MANIFEST_NAME).read_text()
    assert json.dumps(json.loads(Manifest.read(copy).model_dump_json())) == text


def test_keys_of_a_later_release_are_ignored(bundle: Path, tmp_path: Path) -> None:
    """What describes a model may say more; what opens files may not."""
    later = {
        "base": {"name": "tiny", "languages": ["en"]},
        "pruning": {"sparsity": 0.5, "rank": 8},
        "headline": {"dense": {"accuracy": 0.5, "energy_j": 3.0}},
    }
    manifest = Manifest.read(_edited(bundle, tmp_path, **later))
    assert manifest.base.name == "tiny"
    assert manifest.pruning.sparsity == 0.5
    assert manifest.headline.dense.accuracy == 0.5


def test_a_bundle_of_an_earlier_version_is_to_be_built_again(bundle: Path, tmp_path: Path) -> None:
    """Its recipe has keys of other names, so one line says what to do."""
    with raises("unknown-schema-version", "version 1, of racdeploy ", "make it again"):
        Manifest.read(_edited(bundle, tmp_path, schema_version=1))


def test_a_changed_file_is_found(bundle: Path, tmp_path: Path) -> None:
    """One byte in the artifact is enough."""
    copy = _edited(bundle, tmp_path)
    artifact = copy / Manifest.read(copy).artifacts[0].path
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    with raises("differs-from-manifest", str(artifact)):
        Manifest.read(copy).check_files(copy)
