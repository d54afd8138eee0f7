"""Damaged and hostile .racgguf files are errors at once, and leave nothing behind."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from racdeploy.bundles.inspect import inspect_path
from racdeploy.cli.app import app
from racdeploy.errors import ArtifactError
from racdeploy.packing import racgguf
from racdeploy.packing.block_layouts import BLOCK_LAYOUTS
from racdeploy.packing.chunks import unpack_chunk
from racdeploy.packing.packers import bitmask
from racdeploy.packing.racgguf.container import KEYS, VERSION, pack_tensor_infos
from tests.support.commands import find_error_code
from tests.support.errors import raises
from tests.support.tiny_gguf import random_rows, write_gguf

Attack = Callable[[bytearray, racgguf.Container], object]
MAX_BYTES = 200e6
DEFLATED = 1 << 31


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("racgguf")
    tensors = {
        "blk.0.weight": ("q8_0", random_rows("q8_0", 16, 256, 0.5)),
        "blk.1.weight": ("f16", random_rows("f16", 3, 333, 0.6)),
        "norm.weight": ("f32", random_rows("f32", 1, 64, 0.0)),
        "blk.2.weight": ("q4_0", random_rows("q4_0", 16, 256, 0.5)),
    }
    bitmask.pack_file(write_gguf(folder / "m.gguf", tensors), folder / "m.racgguf")
    return folder / "m.racgguf"


def _put(data: bytearray, position: int, code: str, *values: int) -> None:
    struct.pack_into(f"<{code}", data, position, *values)


def _value(container: racgguf.Container, key: str) -> int:
    """Return the position of a key's type; its value follows 4 bytes later."""
    return container.header.key_positions[key] + 8 + len(key)


def _infos(container: racgguf.Container) -> int:
    return container.header.key_positions[""]


def _chunk(container: racgguf.Container, tensor: int) -> int:
    return container.tensors[tensor].position


def _recorded(container: racgguf.Container, index: int) -> int:
    """Return the position of a number in racgguf.tensors."""
    return _value(container, KEYS[4]) + 16 + 8 * index


def _mask(container: racgguf.Container, tensor: int) -> int:
    """Return the position of the mask of a tensor of one chunk."""
    kept = container.tensors[tensor]
    return kept.position + 4 * (1 + BLOCK_LAYOUTS[kept.ggml_type].plane_count)


def _swap_two_bits(data: bytearray, position: int) -> None:
    byte = next(p for p in range(position, position + 64) if bin(data[p] & 3).count("1") == 1)
    data[byte] ^= 3


def _swap_bytes(data: bytearray, one: int, other: int) -> None:
    data[one], data[other] = data[other], data[one]


def _numbers(container: racgguf.Container) -> int:
    """Return the position of the numbers of buckets.

    Behind the table, the number of blocks and three sizes.
    """
    return _chunk(container, 3) + 48 + 16


def _end(container: racgguf.Container, tensor: int) -> int:
    """Return the position of the last byte of a tensor."""
    return container.tensors[tensor].position + container.tensors[tensor].stored_bytes - 1


def _rename(data: bytearray, old: bytes, new: bytes) -> None:
    position = data.index(old)
    data[position : position + len(new)] = new


HEADER: dict[str, Attack] = {
    "magic": lambda d, c: _put(d, 0, "I", 0x46554747 ^ 1),
    "version 2": lambda d, c: _put(d, 4, "I", 2),
    "big-endian version": lambda d, c: _put(d, 4, "I", 3 << 24),
    "tensor count overflows": lambda d, c: _put(d, 8, "Q", 2**64 - 1),
    "key count overflows": lambda d, c: _put(d, 16, "Q", 2**63),
    "one tensor more than there is": lambda d, c: _put(d, 8, "Q", 5),
    "one key less than there is": lambda d, c: _put(d, 16, "Q", len(c.header.metadata) - 1),
    "key length overflows": lambda d, c: _put(d, 24, "Q", 2**64 - 8),
    "key is not UTF-8": lambda d, c: _put(d, 32, "B", 0xFF),
    "key twice": lambda d, c: _rename(d, b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"),
    "unknown metadata type": lambda d, c: _put(d, _value(c, "general.name"), "I", 13),
    "array of arrays": lambda d, c: _put(d, _value(c, "tokenizer.ggml.tokens") + 4, "I", 9),
    "array of 2^61 strings": lambda d, c: _put(
        d, _value(c, "tokenizer.ggml.tokens") + 8, "Q", 2**61
    ),
    "array of 2^62 floats": lambda d, c: _put(
        d, _value(c, "tokenizer.ggml.scores") + 8, "Q", 2**62
    ),
    "string value overflows": lambda d, c: _put(d, _value(c, "general.name") + 4, "Q", 2**64 - 1),
    "string value is not UTF-8": lambda d, c: _put(d, _value(c, "general.name") + 12, "B", 0xC0),
    "name length overflows": lambda d, c: _put(d, _infos(c), "Q", 2**63),
    "name is not UTF-8": lambda d, c: _put(d, _infos(c) + 8, "B", 0xFE),
    "name twice": lambda d, c: _rename(d, b"blk.1.weight", b"blk.0.weight"),
    "no dimensions": lambda d, c: _put(d, _infos(c) + 20, "I", 0),
    "2^32 - 1 dimensions": lambda d, c: _put(d, _infos(c) + 20, "I", 2**32 - 1),
    "a dimension of 0": lambda d, c: _put(d, _infos(c) + 24, "Q", 0),
    "a dimension of 2^64 - 1": lambda d, c: _put(d, _infos(c) + 24, "Q", 2**64 - 1),
    "unknown tensor type": lambda d, c: _put(d, _infos(c) + 32, "I", 99),
    "tensor outside the file": lambda d, c: _put(d, _infos(c) + 36, "Q", 2**40),
    "tensors overlap": lambda d, c: _put(
        d, d.index(b"norm.weight", _infos(c)) + 11 + 4 + 16 + 4, "Q", 0
    ),
}
OWN_KEYS: dict[str, Attack] = {
    "unknown container version": lambda d, c: _put(d, _value(c, KEYS[0]) + 4, "I", 3),
    "the container version before": lambda d, c: _put(d, _value(c, KEYS[0]) + 4, "I", 1),
    "version is a float": lambda d, c: _put(d, _value(c, KEYS[0]), "I", 6),
    "unknown packing": lambda d, c: _rename(d, b"bitmask", b"bitmusk"),
    "a key is missing": lambda d, c: _rename(d, b"racgguf.sha256", b"racgguf.sha257"),
    "size is too large": lambda d, c: _put(d, _value(c, KEYS[2]) + 4, "Q", 2**62),
    "size is 0": lambda d, c: _put(d, _value(c, KEYS[2]) + 4, "Q", 0),
    "sha256 is a path": lambda d, c: _rename(d, c.sha256.encode(), b"../../../../etc/passwd"),
    "sha256 of something else": lambda d, c: _rename(d, c.sha256.encode(), b"0" * 64),
    "records are strings": lambda d, c: _put(d, _value(c, KEYS[4]) + 4, "I", 11),
    "record of an unknown type": lambda d, c: _put(d, _recorded(c, 0), "Q", 77),
    "record of a type that cannot be packed": lambda d, c: _put(d, _recorded(c, 0), "Q", 14),
    "record of another type": lambda d, c: _put(d, _recorded(c, 8), "Q", 26),
    "record of 2^63 dimensions": lambda d, c: _put(d, _recorded(c, 1), "Q", 2**63),
    "record of absurd dimensions": lambda d, c: _put(d, _recorded(c, 2), "Q", 2**61),
    "record of a bomb: less stored than its mask": lambda d, c: _put(
        d, _recorded(c, 3), "Q", 2**30
    ),
    "record of a type in words": lambda d, c: _put(d, _recorded(c, 0), "Q", 39),
    "record of too few words": lambda d, c: _put(d, _recorded(c, 15), "Q", 15),
    "record of other dimensions": lambda d, c: _put(d, _recorded(c, 10), "Q", 32),
}
CHUNKS: dict[str, Attack] = {
    "no blocks": lambda d, c: _put(d, _chunk(c, 0), "I", 0),
    "2^32 - 1 blocks": lambda d, c: _put(d, _chunk(c, 0), "I", 2**32 - 1),
    "one block less": lambda d, c: _put(d, _chunk(c, 0), "I", 127),
    "one block more": lambda d, c: _put(d, _chunk(c, 0), "I", 129),
    "plane of 2^31 - 1 bytes": lambda d, c: _put(d, _chunk(c, 0) + 4, "I", 2**31 - 1),
    "plane of no bytes": lambda d, c: _put(d, _chunk(c, 0) + 4, "I", 0),
    "plain plane called deflated": lambda d, c: _put(d, _chunk(c, 0) + 4, "I", 9 | DEFLATED),
    "the mask keeps one more": lambda d, c: _put(
        d, _mask(c, 0) + 1, "B", d[_mask(c, 0) + 1] ^ 0x10
    ),
    "the mask keeps everything": lambda d, c: d.__setitem__(
        slice(_mask(c, 0), _mask(c, 0) + 512), b"\xff" * 512
    ),
    "the mask keeps nothing": lambda d, c: d.__setitem__(
        slice(_mask(c, 0), _mask(c, 0) + 512), bytes(512)
    ),
    "the mask keeps another": lambda d, c: _swap_two_bits(d, _mask(c, 0)),
    "the mask goes on behind its end": lambda d, c: _put(d, _mask(c, 1) + 124, "B", 0xFF),
    "another scale": lambda d, c: _put(d, _mask(c, 0) + 513, "B", d[_mask(c, 0) + 513] ^ 1),
    "another code": lambda d, c: _put(d, _mask(c, 0) + 900, "B", d[_mask(c, 0) + 900] ^ 1),
    "another plain weight": lambda d, c: _put(d, _chunk(c, 2) + 9, "B", d[_chunk(c, 2) + 9] ^ 1),
}
WORDS: dict[str, Attack] = {
    "a bucket twice as large": lambda d, c: _put(
        d, _chunk(c, 3) + 16, "B", d[_chunk(c, 3) + 16] + 1
    ),
    "a bucket of 2^255 words": lambda d, c: _put(d, _chunk(c, 3) + 47, "B", 255),
    "no words in any bucket": lambda d, c: d.__setitem__(
        slice(_chunk(c, 3) + 16, _chunk(c, 3) + 48), bytes(32)
    ),
    "another cost": lambda d, c: _put(d, _chunk(c, 3), "B", 255 - d[_chunk(c, 3)]),
    "another order of two costs": lambda d, c: _swap_bytes(d, _chunk(c, 3), _chunk(c, 3) + 15),
    "a chunk with a block more": lambda d, c: _put(d, _chunk(c, 3) + 48, "I", 129),
    "another bucket": lambda d, c: _put(d, _numbers(c), "B", d[_numbers(c)] ^ 31),
    "another bucket of the second word": lambda d, c: _put(
        d, _numbers(c) + 512, "B", d[_numbers(c) + 512] ^ 3
    ),
    "all in the first bucket": lambda d, c: d.__setitem__(
        slice(_numbers(c), _numbers(c) + 640), bytes(640)
    ),
    "all in the last bucket": lambda d, c: d.__setitem__(
        slice(_numbers(c), _numbers(c) + 640), b"\xff" * 640
    ),
    "a byte of words more": lambda d, c: _put(d, _chunk(c, 3) + 60, "I", c.tensors[3].stored_bytes),
    "words of 2^32 - 1 bytes": lambda d, c: _put(d, _chunk(c, 3) + 60, "I", 2**32 - 1),
    "words called deflated": lambda d, c: _put(d, _chunk(c, 3) + 63, "B", 0x80),
    "another word": lambda d, c: _put(d, _numbers(c) + 1200, "B", d[_numbers(c) + 1200] ^ 1),
    "bits behind the last word": lambda d, c: _put(d, _end(c, 3), "B", d[_end(c, 3)] ^ 0x80),
}
ATTACKS = HEADER | OWN_KEYS | CHUNKS | WORDS


def _is_refused(file: Path) -> None:
    """The file is an ArtifactError for unpacking and for the cache, in little memory, without
    leftovers.
    """
    before = sorted(file.parent.iterdir())
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            racgguf.Container.open(file).unpack(file.parent / "out.gguf")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert before == sorted(file.parent.iterdir())


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_container_is_refused(intact: Path, tmp_path: Path, attack: str) -> None:
    """Every field that is changed is noticed: at once, or by the hash at the latest."""
    data, file = bytearray(intact.read_bytes()), tmp_path / "m.racgguf"
    ATTACKS[attack](data, racgguf.Container.open(intact))
    assert data != intact.read_bytes(), "the attack changed nothing"
    file.write_bytes(data)
    _is_refused(file)


def test_a_truncated_container_is_refused_wherever_it_ends(intact: Path, tmp_path: Path) -> None:
    """Nothing, half of the fixed part, before and in every key, info, tensor, mask and plane."""
    container, data = racgguf.Container.open(intact), intact.read_bytes()
    places = {0, 3, 4, 8, 16, 24, container.header.data_start, container.header.data_start - 1}
    for start in container.header.key_positions.values():
        places |= {start - 1, start, start + 4, start + 9}
    for index, tensor in enumerate(container.tensors):
        places |= {tensor.position, tensor.position + 3, tensor.position + tensor.stored_bytes - 1}
        places |= {_mask(container, index) + 5} if tensor.packing != "plain" else set()
    for place in sorted(places):
        file = tmp_path / "m.racgguf"
        file.write_bytes(data[:place])
        _is_refused(file)


def _container(file: Path, stored: bytes, rows: int, row_length: int) -> Path:
    """Write a container of one packed f32 tensor with these stored bytes."""
    plain = 24 + len(pack_tensor_infos([("w", (row_length, rows), 0, 0)], 32))
    size_bytes = -(-plain // 32) * 32 + 4 * rows * row_length
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    values = [
        (4, struct.pack("<I", VERSION)),
        (8, text(b"bitmask")),
        (10, struct.pack("<Q", size_bytes)),
        (8, text(b"0" * 64)),
        (9, struct.pack("<IQ4Q", 10, 4, 0, 2, row_length, rows)),
    ]
    data = struct.pack("<4sIQQ", b"GGUF", 3, 1, 5)
    for key, (kind, value) in zip(KEYS, values, strict=True):
        data += text(key.encode()) + struct.pack("<I", kind) + value
    data += pack_tensor_infos([("w", (len(stored),), 24, len(stored))], 32)
    file.write_bytes(data + bytes(-len(data) % 32) + stored)
    return file


def _deflate(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def _record(weights: int, *planes: tuple[bytes, bool]) -> bytes:
    """Return a chunk of f32 weights that are all kept."""
    sizes = [len(data) | (DEFLATED if deflated else 0) for data, deflated in planes]
    return (
        struct.pack("<5I", weights, *sizes)
        + b"\xff" * (weights // 8)
        + b"".join(data for data, _ in planes)
    )


def _unpack(record: bytes) -> np.ndarray:
    source = racgguf.ByteReader(io.BytesIO(record))
    source.seek(0, len(record))
    return unpack_chunk(BLOCK_LAYOUTS[0], source.read)


@pytest.mark.parametrize(
    "case", ["bomb", "short", "trailing", "no end", "garbage", "not smaller", "two chunks"]
)
def test_planes_that_inflate_to_something_else_are_refused(tmp_path: Path, case: str) -> None:
    """A deflated plane is cut off one byte behind its size, so a bomb costs nothing."""
    weights = 32_768
    plane, fine = (
        {
            "bomb": _deflate(bytes(100_000_000))[:30_000],
            "short": _deflate(bytes(weights - 1)),
            "trailing": _deflate(bytes(weights)) + b"more",
            "no end": _deflate(bytes(weights))[:-1],
            "garbage": b"\xff" * 100,
            "not smaller": bytes(weights),
            "two chunks": _deflate(bytes(weights)),
        }[case],
        _deflate(bytes(weights)),
    )
    stored = _record(weights, (plane, True), *[(fine, True)] * 3) * (
        2 if case == "two chunks" else 1
    )
    _is_refused(_container(tmp_path / "m.racgguf", stored, 8, weights // 8))
    if case != "two chunks":
        with pytest.raises(ArtifactError, match="inflate|deflated"):
            _unpack(stored)


def test_a_bomb_is_never_larger_than_its_masks_allow(tmp_path: Path) -> None:
    """All weights zero is the highest ratio there is: 4 bytes from one bit.

    The record itself is intact.
    """
    weights = 262_144
    record = struct.pack("<5I", weights, 0, 0, 0, 0) + bytes(weights // 8)
    assert not _unpack(record).any()
    file = _container(tmp_path / "m.racgguf", record, 512, 512)
    assert racgguf.Container.open(file).size_bytes < 33 * file.stat().st_size
    _is_refused(file)


def test_the_command_line_names_the_file(intact: Path, tmp_path: Path) -> None:
    """Exit code 2, one line and a remedy; a missing file too."""
    file = tmp_path / "m.racgguf"
    file.write_bytes(intact.read_bytes()[:-2000])
    for path in (file, tmp_path / "missing.racgguf"):
        outcome = CliRunner().invoke(app, ["unpack", str(path)])
        assert outcome.exit_code == 2
        assert path.name in outcome.output.replace("\n", "")
        assert "→" in outcome.output
        assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 2
    assert [file] == list(tmp_path.iterdir())
    with pytest.raises(ArtifactError):
        inspect_path(file)


def test_unpack_writes_the_plain_file(intact: Path, tmp_path: Path) -> None:
    """The default name is that of the container with .gguf.

    The container itself is never replaced.
    """
    out = tmp_path / "out.gguf"
    assert CliRunner().invoke(app, ["unpack", str(intact), "--out", str(out)]).exit_code == 0
    assert out.read_bytes() == intact.with_suffix(".gguf").read_bytes()
    refused = CliRunner().invoke(app, ["unpack", str(intact), "--out", str(intact)])
    assert (refused.exit_code, "would replace" in refused.output) == (2, True)
    assert CliRunner().invoke(app, ["unpack", str(intact), "--out", str(out)]).exit_code == 0, (
        "again changes nothing"
    )


@pytest.mark.parametrize("name", ["m.gguf", "m.onnx", "m"])
def test_only_a_container_is_unpacked(tmp_path: Path, name: str) -> None:
    """A file of another suffix is named, and no file is written."""
    (tmp_path / name).write_bytes(b"GGUF")
    outcome = CliRunner().invoke(app, ["unpack", str(tmp_path / name)])
    assert (outcome.exit_code, "[unknown-suffix]" in outcome.output) == (2, True)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_another_file_is_never_replaced(intact: Path, tmp_path: Path) -> None:
    """A file or a folder of that name is refused with a remedy, and stays."""
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "other.gguf").write_bytes(b"mine")
    for name in ("folder.gguf", "other.gguf"):
        refused = CliRunner().invoke(app, ["unpack", str(intact), "--out", str(tmp_path / name)])
        assert (refused.exit_code, "give another path" in refused.output) == (2, True)
    assert (tmp_path / "other.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("case", "code"), [("newer", "unknown-packing-version"), ("plain", "plain-gguf")]
)
def test_an_intact_file_of_another_kind_has_its_own_code(
    intact: Path, tmp_path: Path, case: str, code: str
) -> None:
    """A later version, whose keys may be others, and a GGUF file that is not packed.

    Neither is copied again.
    """
    file = tmp_path / "m.racgguf"
    data = bytearray(
        intact.read_bytes() if case == "newer" else intact.with_suffix(".gguf").read_bytes()
    )
    if case == "newer":
        _put(data, _value(racgguf.Container.open(intact), KEYS[0]) + 4, "I", VERSION + 1)
        _rename(data, b"racgguf.sha256", b"racgguf.sha512")
    file.write_bytes(data)
    with raises(code, str(file)):
        racgguf.Container.open(file)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of resources")
def test_a_disk_that_fills_up_leaves_nothing(intact: Path, tmp_path: Path) -> None:
    """Writing fails behind the check of free space.

    One error with a remedy, exit code 4, no partial file.
    """
    code = (
        "import resource, sys; from racdeploy.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "unpack",
        str(intact),
        "--out",
        str(tmp_path / "out.gguf"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, find_error_code(done.stderr)) == (4, "write-failed")
    assert not list(tmp_path.iterdir())
