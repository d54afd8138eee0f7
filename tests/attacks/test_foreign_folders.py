"""Stages and unpacked files that another user, or a link, has put into a shared folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from racdeploy.api.builds import save_model
from racdeploy.bundles.bench import find_dense_in_work
from racdeploy.files.cache_entries import list_cache_entries
from racdeploy.files.stages import Stage, finished_stages
from racdeploy.packing import racgguf
from racdeploy.packing.packers import bitmask
from tests.support.errors import raises
from tests.support.tiny_gguf import random_rows, write_gguf

NOBODY = 65_534
INPUTS = {"model": "m", "name": "tiny", "version": "1"}
Give = Callable[..., None]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Return what gives paths to another user; who is not root becomes another user itself."""

    def act(*paths: Path) -> None:
        if os.geteuid() == 0:
            for path in paths:
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: NOBODY)

    return act


def _finish(work: Path, name: str = "export") -> Stage:
    stage = Stage.locate(work, name, INPUTS)
    stage.folder.mkdir(parents=True)
    (stage.folder / "inputs.json").write_text(json.dumps(INPUTS))
    stage.finish({"files": {"a": "b"}, "path": "../../secret"})
    return stage


def test_a_stage_of_another_user_is_not_used(tmp_path: Path, give: Give) -> None:
    """Neither as finished nor to go on with, and nothing is written into it."""
    tmp_path.chmod(0o1777)
    stage = _finish(tmp_path)
    assert stage.is_finished
    give(stage.folder)

    before = sorted(stage.folder.iterdir())
    assert not stage.is_finished
    assert finished_stages(tmp_path, "export") == []
    assert find_dense_in_work(tmp_path, {"a": "b"}) is None
    with raises("folder-not-private", stage.folder.name, f"user id {stage.folder.stat().st_uid}"):
        Stage.open(tmp_path, "export", INPUTS)
    assert before == sorted(stage.folder.iterdir())


def test_a_stage_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    """The folder it leads to keeps its partial files, and gets no others."""
    victim, work = tmp_path / "victim", tmp_path / "work"
    (victim / ".thesis.odt.12ab.partial").mkdir(parents=True)
    (victim / "stage.json").write_text("{}")
    work.mkdir()

    stage = Stage.locate(work, "prune", INPUTS)
    stage.folder.symlink_to(victim)
    assert not stage.is_finished
    with raises("folder-not-private", "is a link"):
        Stage.open(work, "prune", INPUTS)
    assert stage.folder not in [entry.path for entry in list_cache_entries(work)]
    assert {".thesis.odt.12ab.partial", "stage.json"} == {path.name for path in victim.iterdir()}


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_what_others_left_unfinished_is_in_nobodys_way(
    tmp_path: Path, give: Give, content: bytes
) -> None:
    """Damaged records of theirs, and a pipe as the record of a link."""
    other = tmp_path / "prune-0123456789abcdef"
    other.mkdir()
    (other / "inputs.json").write_bytes(content)
    (tmp_path / "prune-1").symlink_to(other)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away and go on as the same user")
    give(other)
    assert not Stage.open(tmp_path, "prune", INPUTS).notice


def test_a_model_in_memory_is_not_taken_from_another_user(tmp_path: Path, give: Give) -> None:
    """Its folder is named by its hashes, which anybody may know."""

    class Saved:
        name_or_path = "tiny"

        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{}")

    folder = Path(save_model(Saved(), Saved(), tmp_path))
    assert save_model(Saved(), Saved(), tmp_path) == str(folder)
    give(folder.parent)
    with raises("folder-not-private", folder.parent.name):
        save_model(Saved(), Saved(), tmp_path)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("q8_0", random_rows("q8_0", 8, 64, 0.5))})
    bitmask.pack_file(plain, tmp_path / "m.racgguf")
    return tmp_path / "m.racgguf"


def test_unpacked_files_of_another_user_are_not_used(packed: Path, give: Give) -> None:
    """Though they are right when they are hashed: their owner may change them then."""
    file = racgguf.unpack_to_cache(packed)
    if os.geteuid() == 0:
        give(file)
        assert racgguf.unpack_to_cache(packed).stat().st_uid == 0
    give(file.parent)
    with raises("folder-not-private", "unpacked"):
        racgguf.unpack_to_cache(packed)


def test_a_folder_that_others_could_write_becomes_private(packed: Path) -> None:
    """What was there is unpacked again: who has it open changes the old file."""
    file = racgguf.unpack_to_cache(packed)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert racgguf.unpack_to_cache(packed).stat().st_ino == file.stat().st_ino

    for mode in (0o777, 0o775, 0o1777):
        file.parent.chmod(mode)
        with file.open("r+b") as stream:
            assert racgguf.unpack_to_cache(packed) == file
            stream.write(b"evil")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
        assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("part", ["file", "folder"])
def test_an_unpacked_file_behind_a_link_is_not_used(packed: Path, part: str) -> None:
    """The file it leads to stays as it is."""
    file = racgguf.unpack_to_cache(packed)
    linked = file if part == "file" else file.parent
    moved = linked.rename(packed.parent / "elsewhere")
    linked.symlink_to(moved)
    if part == "folder":
        with raises("folder-not-private", "is a link"):
            racgguf.unpack_to_cache(packed)
        return

    before = moved.read_bytes()
    assert not racgguf.unpack_to_cache(packed).is_symlink()
    assert before == moved.read_bytes()
