"""Kept files: whole or absent, of this very model and form, no more than there are models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

import pytest

from racdeploy import accel
from racdeploy.accel import kept_weights
from racdeploy.storage.checked import file_state
from racdeploy.storage.gguf_header import TensorInfo
from tests.support.tiny_gguf import random_rows, write_gguf

NAMES = ["blk.0.attn_q.weight", "blk.0.attn_v.weight"]


class Packer:
    """Packs what a test says in place of the plug-in, and notes which file it was to use."""

    def __init__(self) -> None:
        self.form: list[int | str] = [1, "portable"]
        self.packed = {NAMES[0]: b"one" * 1_000_001, NAMES[1]: b"two"}
        self.used: list[tuple[bytes, Mapping[str, Sequence[int]]]] = []
        self.huge = True

    def keep(self, stream: FileIO, places: Mapping[str, Sequence[int]]) -> bool:
        """Read all that a map would show."""
        self.used.append((os.pread(stream.fileno(), 1 << 24, 0), places))
        return True

    def maps_huge(self, stream: FileIO) -> bool:
        """Answer as the test wants, for a file as large as one huge page."""
        assert os.fstat(stream.fileno()).st_size == 2 << 20
        return self.huge

    def pack(
        self, path: Path, tensors: Sequence[TensorInfo]
    ) -> Iterator[tuple[tuple[int, int, int, int], memoryview]]:
        """Give what the test wants."""
        for tensor in tensors:
            yield (8, 0, 4, 32), memoryview(self.packed[tensor.name])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, in a process with a cache of its own."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    rows = random_rows("q8_0", 4, 32, 0.5)
    return write_gguf(tmp_path / "model.gguf", dict.fromkeys(NAMES, ("q8_0", rows)))


@pytest.fixture
def kept(model: Path) -> Path:
    """The model's kept file."""
    assert kept_weights.write(Packer(), model, NAMES)
    (file,) = kept_weights.kept_files()
    return file


def _signed(table: object) -> bytes:
    text = json.dumps(table).encode()
    return text + kept_weights._TRAILER.pack(
        len(text), hashlib.sha256(text).digest(), kept_weights._MAGIC
    )


def test_matrices_are_found_where_the_table_says(model: Path, kept: Path) -> None:
    """Each at a multiple of 64 bytes; behind the last, as many as a row of a damaged mask reads."""
    packer = Packer()
    assert kept_weights.use(packer, model, NAMES)
    ((data, places),) = packer.used
    assert places.keys() == set(NAMES)
    for name, (quant, pattern, rows, columns, begin, size) in places.items():
        assert (quant, pattern, rows, columns, begin % 64) == (8, 0, 4, 32, 0)
        assert data[begin : begin + size] == packer.packed[name]
        assert len(data) - begin - size >= 2 * 256 + 128
    assert kept.stat().st_mode & 0o077 == 0
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


def test_one_that_does_not_fit_is_not_used(model: Path, kept: Path) -> None:
    """Of other kernels, without a matrix, of a model that changed, or of another model."""
    other_form = Packer()
    other_form.form = [2, "portable"]
    assert not kept_weights.use(other_form, model, NAMES)
    assert not kept_weights.use(Packer(), model, [*NAMES, "blk.0.attn_k.weight"])
    other = Path(shutil.copy(model, model.with_name("other.gguf")))
    shutil.copy(kept, kept_weights.locate(other))
    assert not kept_weights.use(Packer(), other, NAMES)
    assert kept_weights.use(Packer(), model, NAMES)
    os.utime(model, ns=(1, 1))
    assert not kept_weights.use(Packer(), model, NAMES)


@pytest.mark.parametrize("length", [0, 1, 55, 56, 2_000_000, -1])
def test_a_file_that_is_cut_short_is_not_used(length: int, model: Path, kept: Path) -> None:
    """However much of it there is; it is written again."""
    whole = kept.read_bytes()
    kept.write_bytes(whole[:length])
    assert not kept_weights.use(Packer(), model, NAMES)
    assert kept_weights.write(Packer(), model, NAMES)
    assert kept.read_bytes() == whole


def test_every_spoiled_byte_of_table_and_trailer_is_seen(model: Path, kept: Path) -> None:
    """The table's digest is behind it."""
    whole = kept.read_bytes()
    for place in range(whole.index(b'{"model"'), len(whole)):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not kept_weights.use(Packer(), model, NAMES)


@pytest.mark.parametrize(
    "matrices", [[], {NAMES[0]: 1}, {NAMES[0]: [1] * 5}, {NAMES[0]: [8, 0, 4, 32, 0, 1.5]}]
)
def test_a_table_of_another_kind_is_not_used(matrices: object, model: Path, kept: Path) -> None:
    """Though it is what was written."""
    kept.write_bytes(
        _signed(
            {
                "model": file_state(model),
                "form": [1, "portable"],
                "matrices": matrices,
                "pieces": [],
            }
        )
    )
    assert not kept_weights.use(Packer(), model, [])
    for table in (
        [],
        {"model": [], "form": [], "matrices": {}, "pieces": []},
        {"model": [1], "form": [], "matrices": {}, "pieces": []},
    ):
        kept.write_bytes(_signed(table))
        assert not kept_weights.use(Packer(), model, [])


def test_files_of_models_that_are_gone_or_changed_are_deleted(
    tmp_path: Path, model: Path, kept: Path
) -> None:
    """When the next is written; so is what an interrupted load left, not what is being written."""
    models = [
        Path(shutil.copy(model, tmp_path / f"{name}.gguf")) for name in ("gone", "changed", "same")
    ]
    for path in models:
        assert kept_weights.write(Packer(), path, NAMES)
    (kept.parent / ".old").touch()
    (kept.parent / ".new").touch()
    (kept.parent / "damaged.packed").touch()
    os.utime(kept.parent / ".old", (1, 1))
    models[0].unlink()
    models[1].write_bytes(b"another")
    assert kept_weights.write(Packer(), model, NAMES)
    left = {file.name for file in kept.parent.iterdir()}
    assert left == {kept.name, kept_weights.locate(models[2]).name, ".new"}


def test_where_it_cannot_be_written_nothing_is_left(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No folder, no place, a model that changes meanwhile: the weights are packed in memory."""
    file = tmp_path / "file"
    file.touch()
    with monkeypatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(file))
        assert not kept_weights.write(Packer(), model, NAMES)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=2 * model.stat().st_size - 1)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert not kept_weights.write(Packer(), model, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.utime(model, ns=(1, 1)))
        assert not kept_weights.write(Packer(), model, NAMES)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not kept_weights.write(Packer(), model, NAMES)
    assert list(kept_weights.folder().iterdir()) == []


def test_small_pages_are_used_on_request_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They slow every product down, which loads more often than not make worth less."""
    packer = Packer()
    packer.huge = False
    assert not kept_weights.write(packer, model, NAMES)
    assert list(kept_weights.folder().iterdir()) == []
    monkeypatch.setenv("RACDEPLOY_ACCEL_KEEP", "1")
    assert kept_weights.write(packer, model, NAMES)


def test_what_is_kept_can_be_forgotten(kept: Path, model: Path) -> None:
    """And once more, where nothing is."""
    for _ in range(2):
        accel.forget(model)
        assert not kept.exists()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, for the whole process."""
    assert kept_weights.is_wanted()
    monkeypatch.setenv("RACDEPLOY_ACCEL_KEEP", "0")
    assert not kept_weights.is_wanted()
