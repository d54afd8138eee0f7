"""Damaged and hostile GGUF files are errors at once for ``racdeploy inspect``; sound ones of any
origin are read.
"""

from __future__ import annotations

import ctypes
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from racdeploy.bundles.inspect import inspect_path
from racdeploy.cli.app import app
from racdeploy.errors import ArtifactError, RacdeployError, UsageError
from racdeploy.exporting.gguf.measurement import measure
from racdeploy.quant import ggml
from racdeploy.quant.importance import Importance
from racdeploy.tensors.ggml_types import TYPES_BY_ID
from racdeploy.tensors.gguf_header import GgufHeader, read_header
from tests.support.tiny_gguf import random_rows, write_gguf

MAX_BYTES = 200e6
Attack = Callable[[bytearray, GgufHeader], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        "blk.0.weight": ("q8_0", random_rows("q8_0", 16, 256, 0.5)),
        "blk.1.weight": ("f16", random_rows("f16", 3, 333, 0.6)),
        "norm.weight": ("f32", random_rows("f32", 1, 64, 0.0)),
    }
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tensors)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sound importance matrix."""
    file = tmp_path_factory.mktemp("imatrix") / "m.gguf"
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a"])
    for name in ("blk.0.w.weight", "blk.1.w.weight"):
        writer.add_tensor(f"{name}.in_sum2", np.ones((1, 64), np.float32))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 9, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _put(data: bytearray, position: int, code: str, *values: float) -> None:
    struct.pack_into(f"<{code}", data, position, *values)


def _value(header: GgufHeader, key: str) -> int:
    """Return the position of a key's type; its value follows 4 bytes later."""
    return header.key_positions[key] + 8 + len(key)


def _info(data: bytearray, name: bytes) -> int:
    """Return the position behind a tensor's name: its number of dimensions, then those, its type
    and its offset.
    """
    return data.rindex(name) + len(name)


def _swap(data: bytearray, old: bytes, new: bytes) -> None:
    position = data.index(old)
    data[position : position + len(new)] = new


TOKENS = "tokenizer.ggml.tokens"
ATTACKS: dict[str, Attack] = {
    "magic": lambda d, h: _put(d, 0, "I", 1),
    "version 0": lambda d, h: _put(d, 4, "I", 0),
    "version 1": lambda d, h: _put(d, 4, "I", 1),
    "version 4": lambda d, h: _put(d, 4, "I", 4),
    "big-endian": lambda d, h: _put(d, 4, "I", 3 << 24),
    "2^64 - 1 tensors": lambda d, h: _put(d, 8, "Q", 2**64 - 1),
    "2^63 keys": lambda d, h: _put(d, 16, "Q", 2**63),
    "one tensor more": lambda d, h: _put(d, 8, "Q", 4),
    "one key more": lambda d, h: _put(d, 16, "Q", len(h.metadata) + 1),
    "key of 2^64 - 8 bytes": lambda d, h: _put(d, 24, "Q", 2**64 - 8),
    "empty key": lambda d, h: _put(d, 24, "Q", 0),
    "key is not UTF-8": lambda d, h: _put(d, 32, "B", 0xFF),
    "key twice": lambda d, h: _swap(d, b"tokenizer.ggml.scores", b"tokenizer.ggml.tokens"),
    "metadata type 13": lambda d, h: _put(d, _value(h, "general.name"), "I", 13),
    "string of 2^64 - 1 bytes": lambda d, h: _put(d, _value(h, "general.name") + 4, "Q", 2**64 - 1),
    "string is not UTF-8": lambda d, h: _put(d, _value(h, "general.name") + 12, "B", 0xC0),
    "array of arrays": lambda d, h: _put(d, _value(h, TOKENS) + 4, "I", 9),
    "array of type 99": lambda d, h: _put(d, _value(h, TOKENS) + 4, "I", 99),
    "array of 2^61 strings": lambda d, h: _put(d, _value(h, TOKENS) + 8, "Q", 2**61),
    "array of 2^62 floats": lambda d, h: _put(
        d, _value(h, "tokenizer.ggml.scores") + 8, "Q", 2**62
    ),
    "name of 2^63 bytes": lambda d, h: _put(d, h.key_positions[""], "Q", 2**63),
    "name is not UTF-8": lambda d, h: _put(d, h.key_positions[""] + 8, "B", 0xFE),
    "name twice": lambda d, h: _swap(d, b"blk.1.weight", b"blk.0.weight"),
    "no dimensions": lambda d, h: _put(d, _info(d, b"blk.0.weight"), "I", 0),
    "5 dimensions": lambda d, h: _put(d, _info(d, b"blk.0.weight"), "I", 5),
    "2^32 - 1 dimensions": lambda d, h: _put(d, _info(d, b"blk.0.weight"), "I", 2**32 - 1),
    "a dimension of 0": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 12, "Q", 0),
    "a dimension of 2^64 - 1": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 12, "Q", 2**64 - 1),
    "dimensions whose product is 2^64": lambda d, h: _put(
        d, _info(d, b"blk.0.weight") + 4, "QQ", 2**32, 2**32
    ),
    "a row of half a block": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 4, "Q", 16),
    "one row more": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 12, "Q", 17),
    "type 4, which was removed": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 20, "I", 4),
    "type 43, which is not there yet": lambda d, h: _put(
        d, _info(d, b"blk.0.weight") + 20, "I", 43
    ),
    "type 2^32 - 1": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 20, "I", 2**32 - 1),
    "offset outside the file": lambda d, h: _put(d, _info(d, b"norm.weight") + 16, "Q", 2**40),
    "offset that overflows": lambda d, h: _put(d, _info(d, b"norm.weight") + 16, "Q", 2**64 - 32),
    "offset of the tensor before": lambda d, h: _put(d, _info(d, b"blk.1.weight") + 24, "Q", 0),
    "first tensor not at 0": lambda d, h: _put(d, _info(d, b"blk.0.weight") + 24, "Q", 32),
}  # fmt: skip


def _is_refused(file: Path, read: Callable[[Path], object] = inspect_path) -> RacdeployError:
    """The file is an error of ours, in little memory; return it."""
    tracemalloc.start()
    try:
        with pytest.raises((ArtifactError, UsageError)) as caught:
            read(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_file_is_refused(intact: Path, tmp_path: Path, attack: str) -> None:
    """Every count, length, type and place in the header is checked before it is used."""
    data, file = bytearray(intact.read_bytes()), tmp_path / "m.gguf"
    ATTACKS[attack](data, read_header(intact))
    assert data != intact.read_bytes(), "the attack changed nothing"
    file.write_bytes(data)
    refused = _is_refused(file)
    assert (refused.code, str(file) in refused.message) == ("damaged-gguf", True)


def _boundaries(file: Path) -> set[int]:
    header = read_header(file)
    places = {0, 3, 4, 8, 16, 24, header.data_start - 1}
    for start in header.key_positions.values():
        places |= {start - 1, start, start + 4, start + 9}
    for tensor in header.tensors:
        places |= {tensor.position, tensor.position + 3, tensor.position + tensor.size_bytes - 1}
    return places


def test_a_cut_file_is_refused_wherever_it_ends(intact: Path, tmp_path: Path) -> None:
    """Before and inside the fixed part, every key, every info and every tensor."""
    data, file = intact.read_bytes(), tmp_path / "m.gguf"
    for place in sorted(_boundaries(intact)):
        file.write_bytes(data[:place])
        assert _is_refused(file).code == "damaged-gguf"


def test_a_cut_matrix_is_refused_wherever_it_ends(matrix: Path, tmp_path: Path) -> None:
    """An importance matrix is a GGUF file like any other."""
    data, file = matrix.read_bytes(), tmp_path / "m.gguf"
    assert len(Importance.read(matrix).means) == 2
    for place in sorted(_boundaries(matrix)):
        file.write_bytes(data[:place])
        assert _is_refused(file, Importance.read).code == "damaged-gguf"


@pytest.mark.parametrize(
    ("attack", "code", "value"),
    [
        (lambda d: _swap(d, b"imatrix", b"imatriX"), "no-importance-matrix", "m.gguf"),
        (
            lambda d: _swap(d, b"blk.0.w.weight.counts", b"blk.0.w.weight.countz"),
            "damaged-importance",
            "'blk.0.w.weight'",
        ),
        (
            lambda d: _put(d, _info(d, b"blk.0.w.weight.in_sum2") + 4, "QQ", 32, 2),
            "damaged-importance",
            "2 sums",
        ),
        (
            lambda d: _put(d, _info(d, b"blk.0.w.weight.in_sum2") + 20, "I", 26),
            "damaged-importance",
            "'blk.0.w.weight.in_sum2'",
        ),
        (lambda d: _put(d, len(d) - 32, "f", float("nan")), "damaged-importance", "nan"),
        (lambda d: _put(d, len(d) - 32, "f", -3.0), "damaged-importance", "-3.0"),
        (lambda d: _put(d, len(d) - 32, "f", float("inf")), "damaged-importance", "inf"),
        (
            lambda d: _put(d, len(d) - 40, "f", float("inf")),
            "importance-not-finite",
            "'blk.1.w.weight'",
        ),
        (lambda d: _put(d, len(d) - 40, "f", -1.0), "importance-not-finite", "'blk.1.w.weight'"),
    ],
)
def test_a_hostile_matrix_is_refused(
    matrix: Path, tmp_path: Path, attack: Callable[[bytearray], None], code: str, value: str
) -> None:
    """Names, shapes, types and values are checked."""
    data, file = bytearray(matrix.read_bytes()), tmp_path / "m.gguf"
    attack(data)
    file.write_bytes(data)
    refused = _is_refused(file, Importance.read)
    assert (refused.code, value in refused.message) == (code, True)


def _write_part(
    file: Path,
    number: int,
    count: int,
    names: list[str],
    total: int | None = None,
    told: np.ndarray | None = None,
) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint16("split.no", number)
    if told is None:
        writer.add_uint16("split.count", count)
    else:
        writer.add_key_value(
            "split.count", told.tolist(), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64
        )
    writer.add_int32("split.tensors.count", len(names) * count if total is None else total)
    for name in names:
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _name(number: int, count: int = 2, stem: str = "m") -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    """All tensors are listed, from whatever folder the name leads to."""
    for number in range(2):
        _write_part(tmp_path / _name(number), number, 2, [f"t{number}"])
    assert [row.name for row in inspect_path(tmp_path / _name(0)).tensors] == ["t0", "t1"]


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("a part is missing", "missing-split"),
        ("given the second", "not-first-split"),
        ("a part is another", "wrong-split"),
        ("counts differ", "wrong-split"),
        ("a tensor twice", "splits-differ"),
        ("a tensor too few", "splits-differ"),
        ("65535 parts", "missing-split"),
        ("the name says another count", "renamed-split"),
        ("the name says nothing", "renamed-split"),
        ("the name leads out of the folder", "missing-split"),
        ("a part is cut", "damaged-gguf"),
        ("the count is an array", "renamed-split"),
    ],
)
def test_bad_parts_are_refused(tmp_path: Path, case: str, code: str) -> None:
    """Other files are looked for by the name of the first one, never by what stands in it."""
    first, second = (_write_part(tmp_path / _name(n), n, 2, [f"t{n}"]) for n in range(2))
    given = first
    match case:
        case "a part is missing":
            second.unlink()
        case "given the second":
            given = second
        case "a part is another":
            second.write_bytes(first.read_bytes())
        case "counts differ":
            _write_part(second, 1, 3, ["t1"])
        case "a tensor twice":
            _write_part(second, 1, 2, ["t0"])
        case "a tensor too few":
            _write_part(first, 0, 2, ["t0"], total=3)
        case "65535 parts":
            given = _write_part(tmp_path / _name(0, 65535), 0, 65535, ["t0"])
        case "the name says another count":
            given = first.rename(tmp_path / _name(0, 3))
        case "the name says nothing":
            given = first.rename(tmp_path / "m.gguf")
        case "the name leads out of the folder":
            (tmp_path / "inner").mkdir()
            given = first.rename(tmp_path / "inner" / _name(0, 2, ".."))
        case "the count is an array":
            _write_part(first, 0, 2, ["t0"], told=np.array([2, 2]))
        case "a part is cut":
            second.write_bytes(second.read_bytes()[:-40])
    assert _is_refused(given).code == code


@pytest.mark.parametrize("ggml_type", sorted(TYPES_BY_ID))
def test_every_type_of_ggml_is_read(tmp_path: Path, ggml_type: int) -> None:
    """Random blocks of any type are listed with their size; zeros are counted as ggml does, or are
    unknown.
    """
    _, _, block_weights, block_bytes = TYPES_BY_ID[ggml_type]
    library = ggml._library()
    library.ggml_type_name.restype = ctypes.c_char_p
    assert (library.ggml_blck_size(ggml_type), library.ggml_type_size(ggml_type)) == (
        block_weights,
        block_bytes,
    )
    rows, row_length = 3, 512
    data = np.random.default_rng(ggml_type).integers(
        0, 256, (rows, row_length // block_weights * block_bytes), np.uint8
    )
    data[1] = 0
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack(
        "<Q1sI2QIQ", 1, b"w", 2, row_length, rows, ggml_type, 0
    )
    file = tmp_path / "m.gguf"
    file.write_bytes(header + bytes(-len(header) % 32) + data.tobytes())
    _, (row,) = measure(file)
    assert (row.shape, row.size_bytes) == ((rows, row_length), data.nbytes)
    known = {int(kind): kind.name.lower() for kind in GGMLQuantizationType}
    assert row.type == known.get(ggml_type, f"ggml type {ggml_type}")
    name = f"dequantize_row_{library.ggml_type_name(ggml_type).decode()}"
    if row.zeros is None:
        assert row.type.startswith(("ggml type", "q8_1", "q8_k", "q1_0")), "gguf-py reads this type"
        return
    if block_weights > 1 and hasattr(library, name):
        out = np.empty(rows * row_length, np.float32)
        convert = library[name]
        convert.argtypes, convert.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
        convert(data.ctypes.data, out.ctypes.data, out.size)
        assert row.zeros == pytest.approx(np.mean(out == 0))


def test_version_2_and_gaps_in_the_metadata_are_no_damage(intact: Path, tmp_path: Path) -> None:
    """Version 2 has the same form; the command shows sparsity and bits a weight of the whole
    file.
    """
    data, file = bytearray(intact.read_bytes()), tmp_path / "m.gguf"
    _put(data, 4, "I", 2)
    file.write_bytes(data)
    with np.errstate(all="ignore"):
        found = inspect_path(file)
    sizes = [16 * 256 * 8.5, 3 * 333 * 16, 64 * 32]
    weights = [16 * 256, 3 * 333, 64]
    assert found.summary["bits_per_weight"] == pytest.approx(sum(sizes) / sum(weights), abs=1e-3)
    zeros = sum(
        (row.zeros or 0) * count for row, count in zip(found.tensors, weights, strict=True)
    ) / sum(weights)
    assert found.summary["zeros_of_all_weights"] == pytest.approx(zeros, abs=1e-3)
    assert [row["bits"] for row in found.to_json()["tensors"]] == [8.5, 16, 32]
    outcome = CliRunner().invoke(app, ["inspect", str(file)])
    assert outcome.exit_code == 0
    assert "bits_per_weight: 10." in outcome.output
