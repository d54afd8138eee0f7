"""Links that lie where racdeploy writes: none is followed, whatever its name."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.files import writing
from racdeploy.files.writing import atomic_folder, file_sha256, write_atomic
from racdeploy.packing.packers import bitmask
from racdeploy.quant.importance import Importance
from tests.support.errors import raises
from tests.support.tiny_gguf import random_rows, write_gguf

SECRET = b"ssh-ed25519 AAAA of the user"
pytestmark = [
    pytest.mark.answers("H1"),
    pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there"),
]


def _unpack(plain: Path, out: Path) -> None:
    packed = out.with_suffix(".racgguf")
    bitmask.pack_file(plain, packed)
    done = CliRunner().invoke(app, ["unpack", str(packed), "--out", str(out)])
    assert done.exit_code == 0, done.output


def _pack(plain: Path, out: Path) -> None:
    bitmask.pack_file(plain, out)


def _write_file(plain: Path, out: Path) -> None:
    write_atomic(out, "content")


def _write_folder(plain: Path, out: Path) -> None:
    with atomic_folder(out) as scratch:
        (scratch / "file").write_text("content")


def _write_imatrix(plain: Path, out: Path) -> None:
    importance = Importance(plain, {"w": np.ones(32, np.float32)}, {"w": 3})
    importance.write_imatrix(out, {"blk.0.weight": ("w",)})


WRITERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "unpack": ("x.gguf", _unpack),
    "pack": ("x.racgguf", _pack),
    "a file": ("report.json", _write_file),
    "a folder": ("bundle", _write_folder),
    "an importance matrix": ("x.imatrix.gguf", _write_imatrix),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_link_is_followed_when_a_file_is_written(tmp_path: Path, writer: str) -> None:
    """Links of every name that was ever foreseeable, and of the file itself, point to a secret."""
    name, write = WRITERS[writer]
    out = tmp_path / "archive" / name
    out.parent.mkdir()
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("q8_0", random_rows("q8_0", 16, 256, 0.5))})
    victim = tmp_path / "authorized_keys"
    victim.write_bytes(SECRET)

    middles = ("", ".data", ".plain", ".old", *(f".{pid}" for pid in (1, 2, os.getpid())))
    for hidden in [f".{name}{middle}{end}" for middle in middles for end in (".partial", "")]:
        out.with_name(hidden).symlink_to(victim)
    if writer != "unpack":  # which refuses to replace what it did not write
        out.symlink_to(victim)
    before = set(out.parent.iterdir())

    write(plain, out)

    assert victim.read_bytes() == SECRET
    assert not out.is_symlink()
    assert out.exists()
    added = {path.name for path in set(out.parent.iterdir()) - before}
    assert added <= {name, "x.racgguf"}, "nothing is left behind"


def test_a_pipe_of_such_a_name_is_not_waited_for(tmp_path: Path) -> None:
    """Nor is it removed: we never made it."""
    pipe = tmp_path / ".file.0123456789abcdef.partial"
    os.mkfifo(pipe)
    write_atomic(tmp_path / "file", "content")
    assert {pipe, tmp_path / "file"} == set(tmp_path.iterdir())


def test_a_pipe_is_not_waited_for_when_it_is_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard-00000.jsonl")
    with raises("not-a-regular-file"):
        file_sha256(tmp_path / "shard-00000.jsonl")


def test_a_disk_that_fails_at_the_end_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems report at close what they could not write."""

    class Failing(io.BufferedRandom):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "o").write_text("old")
    monkeypatch.setattr(
        writing, "open", lambda file, *_, **options: Failing(io.FileIO(file, "r+")), raising=False
    )
    with raises("write-failed", "Input/output error"):
        write_atomic(tmp_path / "o", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("o", "old")]
