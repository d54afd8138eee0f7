"""Libraries, kept weights and counts that another user, or chance, may have changed."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path

import pytest

from racdeploy.accel import ggml_weights, kept_weights
from racdeploy.accel.library import Library
from racdeploy.accel.proof import Kernels, Proof, pin, readiness
from racdeploy.errors import EngineError, EnvironmentFailure
from racdeploy.storage.checked import file_state
from racdeploy.storage.files import file_sha256
from racdeploy.storage.gguf_header import TensorInfo
from racdeploy.storage.ownership import explain_foreign
from tests.support.tiny_gguf import random_rows, write_gguf

pytestmark = [
    pytest.mark.answers("M6", "M7"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions"),
]
NAMES = ["blk.0.attn_q.weight", "blk.0.attn_v.weight"]
NOBODY = 65_534
as_root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root may give files away"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for kernels and all that is remembered, where others come: pytest's own are shut."""
    with tempfile.TemporaryDirectory() as name:
        reached = Path(name)
        reached.chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", str(reached / "user"))
        monkeypatch.setenv("RACDEPLOY_ACCEL", str(reached / "accel"))
        yield reached / "accel"


def _library(folder: Path, value: int) -> Library:
    source = folder / f"value{value}.cpp"
    source.write_text(
        f'extern "C" __attribute__((visibility("default"))) int value() {{ return {value}; }}\n'
    )
    return Library("example", (str(source),))


@pytest.fixture
def kernels(cache: Path, tmp_path: Path) -> Kernels:
    """A library that was tried and found good."""
    found = Kernels(_library(tmp_path, 7), "no.trial", "not built")
    file = found.library.build()
    record = found.locate_record(file)
    record.write_text(json.dumps(asdict(Proof("", file_sha256(file)))))
    assert readiness(found) == (file, Proof("", file_sha256(file)))
    return found


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o703])
def test_a_library_in_a_folder_that_others_may_write_is_not_used(
    kernels: Kernels, cache: Path, mode: int
) -> None:
    """Nor is one built there; a command says how to mend it."""
    cache.chmod(mode)
    found = readiness(kernels)
    assert isinstance(found, str)
    assert f"chmod go-w {cache}" in found
    with pytest.raises(EnvironmentFailure, match="chmod go-w"):
        Library("other", kernels.library.sources).build()


@as_root
@pytest.mark.parametrize("what", ["folder", "library", "record"])
def test_a_library_of_another_user_is_not_used(kernels: Kernels, cache: Path, what: str) -> None:
    """Whichever of the folder, the library and its proof was made by somebody else."""
    file = kernels.library.find()
    assert file is not None
    places = {"folder": cache, "library": file, "record": kernels.locate_record(file)}
    os.chown(places[what], NOBODY, NOBODY)
    found = readiness(kernels)
    assert isinstance(found, str)
    assert f"{places[what]} belongs to another user" in found


def test_a_link_to_a_library_is_not_used(kernels: Kernels, tmp_path: Path) -> None:
    """Though what it leads to is the very library."""
    file = kernels.library.find()
    assert file is not None
    file.rename(tmp_path / "moved.so")
    file.symlink_to(tmp_path / "moved.so")
    assert "is not used" in str(readiness(kernels))


def test_a_folder_that_others_cannot_reach_may_be_open_to_a_group(cache: Path) -> None:
    """As of a user whose umask is 002, below a cache of mode 700."""
    inner = cache / "inner"
    inner.mkdir(parents=True)
    inner.chmod(0o775)
    cache.chmod(0o700)
    assert explain_foreign(inner) == ""
    cache.chmod(0o755)
    assert "chmod go-w" in explain_foreign(inner)


@pytest.mark.skipif(sys.platform != "linux", reason="by the name of a descriptor in /proc")
def test_what_is_loaded_is_what_was_checked(kernels: Kernels, tmp_path: Path) -> None:
    """Though another library takes its name between the check and the load."""
    file = kernels.library.find()
    assert file is not None
    pinned = pin(file, file_sha256(file))
    other = _library(tmp_path, 8).build()
    other.replace(file)
    assert ctypes.CDLL(str(pinned)).value() == 7


def test_a_replaced_library_is_not_loaded(kernels: Kernels, tmp_path: Path) -> None:
    """Neither at the first look nor by the hash that was read before: llama.cpp's as onnxruntime's,
    which share these lines.
    """
    file = kernels.library.find()
    assert file is not None
    sha256 = file_sha256(file)
    _library(tmp_path, 8).build().replace(file)
    assert "is not the one that was tried" in str(readiness(kernels))
    with pytest.raises(EngineError, match="is not the one that was tried"):
        pin(file, sha256)


class Packer:
    """Packs what a test says in place of the plug-in."""

    def __init__(self) -> None:
        self.form: list[int | str] = [1, "portable"]
        self.packed = {NAMES[0]: bytes(range(256)) * 12_000, NAMES[1]: b"two"}

    def keep(self, stream: FileIO, places: Mapping[str, Sequence[int]]) -> bool:
        """Take whatever comes."""
        return True

    def maps_huge(self, stream: FileIO) -> bool:
        """Say yes."""
        return True

    def pack(
        self, path: Path, tensors: Sequence[TensorInfo]
    ) -> Iterator[tuple[tuple[int, int, int, int], memoryview]]:
        """Give what the test wants."""
        for tensor in tensors:
            yield (8, 0, 4, 32), memoryview(self.packed[tensor.name])


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    rows = random_rows("q8_0", 4, 32, 0.5)
    return write_gguf(tmp_path / "model.gguf", dict.fromkeys(NAMES, ("q8_0", rows)))


@pytest.fixture
def kept(model: Path) -> Path:
    """The model's kept file, as old as one of a real cache; used once, so that it is known."""
    assert kept_weights.write(Packer(), model, NAMES)
    (file,) = kept_weights.kept_files()
    assert kept_weights.use(Packer(), model, NAMES)
    return file


@pytest.mark.parametrize("place", [0, 1, 1_000_000, 1_048_576, 2_500_000, -300])
def test_one_changed_byte_of_kept_weights_is_seen(model: Path, kept: Path, place: int) -> None:
    """Though its times are set back, and wherever it is."""
    times = kept.stat()
    data = bytearray(kept.read_bytes())
    data[data.index(b'{"model"') + place if place < 0 else place] ^= 1
    with kept.open("r+b") as stream:
        stream.write(data)
    os.utime(kept, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not kept_weights.use(Packer(), model, NAMES)
    assert kept_weights.write(Packer(), model, NAMES)
    assert kept_weights.use(Packer(), model, NAMES)


def test_a_byte_that_the_disk_changed_is_seen_sooner_or_later(
    model: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells of it, so some pieces are compared on every load, and all within a few."""
    data = bytearray(kept.read_bytes())
    data[1_500_000] ^= 1
    kept.write_bytes(data)
    monkeypatch.setattr(kept_weights, "check_once", lambda *_, **__: True)
    assert not all(kept_weights.use(Packer(), model, NAMES) for _ in range(40))


def test_kept_weights_of_an_open_folder_are_neither_used_nor_written(
    model: Path, kept: Path
) -> None:
    """The model's own are packed in memory."""
    kept.parent.parent.chmod(0o755)
    kept.parent.chmod(0o777)
    assert not kept_weights.use(Packer(), model, NAMES)
    kept.unlink()
    assert not kept_weights.write(Packer(), model, NAMES)
    assert not kept_weights.kept_files()


def test_a_model_that_was_replaced_in_place_is_another_model(model: Path, kept: Path) -> None:
    """With the same size, times and inode: the time of its last change cannot be set."""
    before, times = file_state(model), model.stat()
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    with model.open("r+b") as stream:
        stream.write(data)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = model.stat()
    assert (times.st_size, times.st_mtime_ns, times.st_ino) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ino,
    )
    assert before != file_state(model)
    assert not kept_weights.use(Packer(), model, NAMES)


DAMAGES = {
    "other names": lambda text: text.replace("blk.0", "blk.9"),
    "another share": lambda text: text.replace("0.", "0.9", 1),
    "half": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "numbers": lambda text: '{"zeros": {"a": 1}, "sha256": ""}',
    "no Unicode": lambda text: "\udcff",
}


@pytest.mark.answers("L6")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_count_is_counted_again(model: Path, damage: str) -> None:
    """It is never an error, nor does a wrong name reach llama.cpp."""

    class Counter:
        counted = 0
        form = (3, "avx512")

        def zeros(self, path: Path, header: object, threads: int) -> dict[str, tuple[str, float]]:
            """Count, and count the counts."""
            self.counted += 1
            return dict.fromkeys(NAMES, ("q8_0", 0.5))

    plugin = Counter()
    expected = ggml_weights._zeros(plugin, model, 1)
    assert expected == ggml_weights._zeros(plugin, model, 1)
    assert plugin.counted == 1

    file = ggml_weights._zeros_file(model)
    file.write_bytes(DAMAGES[damage](file.read_text()).encode("utf-8", "surrogateescape"))
    assert expected == ggml_weights._zeros(plugin, model, 1)
    assert plugin.counted == 2


def test_the_trial_is_not_started_where_others_may_write(kernels: Kernels, cache: Path) -> None:
    """It would run the library."""
    file = kernels.library.find()
    assert file is not None
    cache.chmod(0o777)
    with pytest.raises(EnvironmentFailure, match="chmod go-w"):
        kernels.prove(file)
