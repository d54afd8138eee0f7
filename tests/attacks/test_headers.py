"""Headers of GGUF and safetensors that ask for more than any model needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.bundles.inspect import inspect_path
from racdeploy.cli.app import app
from racdeploy.errors import ModelError
from racdeploy.tensors.gguf_header import read_header
from tests.support.errors import raises

ARRAY, STRING = 9, 8


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf(tensors: int, keys: int, rest: bytes) -> bytes:
    name = _string(b"general.architecture") + struct.pack("<I", STRING) + _string(b"llama")
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys + 1) + name + rest


def _array(kind: int, count: int) -> bytes:
    return _string(b"k") + struct.pack("<IIQ", ARRAY, kind, count)


MANY_KEYS = b"".join(_string(b"k%d" % n) + struct.pack("<IB", 0, 1) for n in range(100_000))
SPARSE = {
    "a text of 1 GB": _gguf(0, 1, _string(b"k") + struct.pack("<IQ", STRING, 10**9)),
    "a key of 100 MB": _gguf(0, 1, struct.pack("<Q", 10**8)),
    "a tensor's name of 60 MB": _gguf(1, 0, struct.pack("<Q", 60_000_000)),
    "10 million numbers that are kept": _gguf(0, 1, _array(10, 10_000_000)),
    "200 million texts": _gguf(0, 1, _array(STRING, 200_000_000)),
    "2 arrays of 2 million texts": _gguf(0, 2, _array(STRING, 2_000_000) + bytes(16_000_000))
    + _array(STRING, 2_000_000).replace(b"k", b"l", 1),
    "100,000 keys": _gguf(0, 100_000, MANY_KEYS),
    "10 million tensors": _gguf(10_000_000, 0, b""),
    "2^63 keys": _gguf(0, 2**63, b""),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.takes(4, "writes and reads 3 million texts")
def test_a_header_has_a_bound_however_large_the_file_is(tmp_path: Path, name: str) -> None:
    """Of memory and of time; the file takes no space on the disk."""
    file = tmp_path / "s.gguf"
    with file.open("wb") as stream:
        stream.write(SPARSE[name])
        stream.truncate(10_000_000_000)
    with raises("damaged-gguf", "50,000,000 bytes of memory"):
        read_header(file)


def test_numbers_that_are_not_kept_are_not_read(tmp_path: Path) -> None:
    """400 million scores, 1.6 GB."""
    file = tmp_path / "s.gguf"
    with file.open("wb") as stream:
        stream.write(_gguf(0, 1, _array(6, 400_000_000)))
        stream.truncate(1_700_000_000)
    assert read_header(file).metadata["k"] is None


def test_a_header_of_a_large_vocabulary_is_read(tmp_path: Path) -> None:
    """A million tokens and a million merges, and a tokenizer.json of 14 MB."""
    array = _array(STRING, 1_000_000) + _string(b"token") * 1_000_000
    merges = array.replace(_string(b"k"), _string(b"merges"), 1)
    text = _string(b"tokenizer") + struct.pack("<I", STRING) + _string(b"x" * 14_000_000)
    file = tmp_path / "v.gguf"
    file.write_bytes(_gguf(0, 3, array + merges + text))
    assert [*read_header(file).metadata] == ["general.architecture", "k", "merges", "tokenizer"]


def _safetensors(file: Path, names: list[str], shape: list[int]) -> Path:
    header: dict[str, Any] = {}
    for index, name in enumerate(names):
        offsets = [index, index + 1]
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))
    return file


@pytest.fixture(scope="module")
def many_tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is written before anything is measured, which takes half a second."""
    file = tmp_path_factory.mktemp("headers") / "m.safetensors"
    return _safetensors(file, [f"t{n}" for n in range(100_001)], [])


def test_tensors_of_a_checkpoint_have_a_number(many_tensors: Path, tmp_path: Path) -> None:
    """More than any model has are refused."""
    with raises("damaged-safetensors", "100,001 tensors"):
        inspect_path(many_tensors)
    with pytest.raises(ModelError):
        inspect_path(_safetensors(tmp_path / "m.safetensors", ["x" * 16_000_000], []))


@pytest.mark.parametrize(
    "names",
    [["blk." + "9" * 5000 + ".ffn_down.weight"], ["x" * 3_000_000], ["\t" * 3000, "a" * 3000]],
    ids=["a block's number", "3 MB", "tabs"],
)
def test_a_long_name_is_shown_in_part(tmp_path: Path, names: list[str]) -> None:
    """And does not end the command."""
    file = _safetensors(tmp_path / "m.safetensors", names, [1, 1])
    done = CliRunner().invoke(app, ["inspect", str(file)])
    assert done.exit_code == 0, done.output
    assert len(done.output) < 5000 * len(names)
    rows = json.loads(CliRunner().invoke(app, ["inspect", str(file), "--json"]).output)["tensors"]
    assert names == [row["name"] for row in rows]


@pytest.mark.takes(6, "a table of 1,000 rows")
def test_a_table_shows_some_rows_and_their_number(tmp_path: Path) -> None:
    """The types are added up over all."""
    file = _safetensors(tmp_path / "m.safetensors", [f"t{n}" for n in range(20_000)], [])
    done = CliRunner().invoke(app, ["inspect", str(file)])
    assert "19,000 more tensors: --json lists them" in done.output
    assert "\nt999 " in done.output
    assert "\nt1000 " not in done.output
    assert "20000" in done.output


def test_a_long_value_is_shown_in_part(tmp_path: Path) -> None:
    """A description of 40 MB."""
    text = _string(b"general.description") + struct.pack("<I", STRING)
    file = tmp_path / "v.gguf"
    file.write_bytes(_gguf(0, 1, text + _string(b"x" * 40_000_000)))
    done = CliRunner().invoke(app, ["inspect", str(file)])
    assert done.exit_code == 0, done.output
    assert len(done.output) < 2000
