"""A container gives back its GGUF file byte for byte, whatever is in it, and lists like any GGUF
file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racdeploy.exporting.gguf import measure
from racdeploy.files.writing import file_sha256
from racdeploy.packing import racgguf
from racdeploy.packing.block_layouts import CHUNK_WEIGHTS
from racdeploy.packing.packers import bitmask
from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy.tensors.gguf_header import count_tensor_bytes
from tests.support.errors import raises
from tests.support.tiny_gguf import random_rows, write_gguf

PACKABLE = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "mxfp4")


def _round_trip(plain: Path) -> tuple[racgguf.PackedTensor, ...]:
    """Pack and unpack a file, compare the bytes, and return how each tensor was stored."""
    packed, out = plain.with_suffix(".racgguf"), plain.with_suffix(".again.gguf")
    rows = bitmask.pack_file(plain, packed)
    racgguf.Container.open(packed).unpack(out)
    assert plain.read_bytes() == out.read_bytes()
    return rows


_TENSORS = st.lists(
    st.tuples(
        st.sampled_from([*PACKABLE, "q6_k"]),
        st.integers(1, 5),
        st.integers(1, 60),
        st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.99, 1.0]),
        st.integers(0, 2**32),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(tensors=_TENSORS, alignment=st.sampled_from([1, 8, 32, 256]))
def test_unpacking_is_the_inverse_of_packing(
    tensors: list[tuple[str, int, int, float, int]], alignment: int
) -> None:
    """Random shapes, number formats, masks, scales and alignments: every byte comes back."""
    made = {}
    for number, (kind, rows, length, zeros, seed) in enumerate(tensors):
        row_length = length * (256 if kind == "q6_k" else 32 if kind[0] in "qm" else 1)
        made[f"blk.{number}.weight"] = kind, random_rows(kind, rows, row_length, zeros, seed)
    with TemporaryDirectory() as folder:
        _round_trip(write_gguf(Path(folder) / "m.gguf", made, alignment))


@pytest.mark.parametrize("kind", PACKABLE)
@pytest.mark.parametrize("weights", [CHUNK_WEIGHTS - 32, CHUNK_WEIGHTS, CHUNK_WEIGHTS + 32])
def test_chunks_end_anywhere(tmp_path: Path, kind: str, weights: int) -> None:
    """One weight block less or more than a chunk makes no difference."""
    (row,) = _round_trip(
        write_gguf(tmp_path / "m.gguf", {"w": (kind, random_rows(kind, 1, weights, 0.6))})
    )
    assert (row.reason, row.stored_bytes < 0.75 * row.plain_bytes) == ("", True)


@pytest.mark.parametrize(("kind", "weights", "mask_bytes"), [("f16", 12, 2), ("q4_0", 4096, 640)])
def test_a_tensor_shorter_than_its_mask_is_damaged(
    kind: str, weights: int, mask_bytes: int
) -> None:
    """The last bits of a mask take a whole byte."""
    ggml_type = GGML_TYPES[kind].type_id
    stored = racgguf.StoredTensor(
        name="w",
        dimensions=(weights,),
        ggml_type=ggml_type,
        packing="bitmask",
        plain_bytes=count_tensor_bytes((weights,), ggml_type),
        stored_bytes=mask_bytes,
        position=0,
    )
    assert bitmask.find_damage(stored) == ""
    damage = bitmask.find_damage(replace(stored, stored_bytes=mask_bytes - 1))
    assert f"less than the {mask_bytes} of its mask" in damage


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_negative_zeros_and_nans_come_back(tmp_path: Path, kind: str) -> None:
    """Minus zero is no zero code, and no value is read as a number."""
    plain_OP = random_rows(kind, 4, 512, 0.6)
    width = 4 if kind == "f32" else 2
    plain_OP.reshape(-1, width)[::3] = [0] * (width - 1) + [0x80]
    plain_OP.reshape(-1, width)[1::7] = 0xFF
    plain_OP.reshape(-1, width)[::2] = 0
    (row,) = _round_trip(write_gguf(tmp_path / "m.gguf", {"w": (kind, plain_OP)}))
    assert row.reason == ""


def test_what_does_not_pay_stays_plain_with_a_reason(tmp_path: Path) -> None:
    """Dense tensors and formats with other fields are stored as they are."""
    tensors = {
        "dense": ("q8_0", random_rows("q8_0", 8, 256, 0.1)),
        "sparse": ("q8_0", random_rows("q8_0", 8, 256, 0.5)),
        "k-quant": ("q6_k", random_rows("q6_k", 2, 256, 0.5)),
        "small": ("q4_0", random_rows("q4_0", 15, 256, 0.5)),
        "large enough": ("q4_0", random_rows("q4_0", 16, 256, 0.5)),
    }
    dense, sparse, k_quant, small, large = _round_trip(write_gguf(tmp_path / "m.gguf", tensors))
    assert "zeros do not pay" in dense.reason
    assert sparse.reason == ""
    assert "ggml type 14" in k_quant.reason
    assert small.reason == "its 3840 weights do not pay for a table"
    assert large.reason == ""


def test_a_file_that_would_come_back_changed_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container is unpacked before it gets its name, so a mistake in the codec leaves none."""
    unpack_chunk = bitmask.unpack_chunk
    monkeypatch.setattr(
        bitmask,
        "unpack_chunk",
        lambda *arguments: unpack_chunk(*arguments) ^ np.uint8(1),
    )
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("f16", random_rows("f16", 8, 256, 0.5))})
    with raises("cannot-be-packed", "would unpack to other bytes"):
        bitmask.pack_file(plain, tmp_path / "m.racgguf")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_other_readers_list_a_container(tmp_path: Path) -> None:
    """gguf-py reads names and metadata; the packed bytes are an I8 tensor."""
    tensors = {
        "a": ("q8_0", random_rows("q8_0", 8, 256, 0.5)),
        "b": ("f32", random_rows("f32", 1, 64, 0.0)),
    }
    plain = write_gguf(tmp_path / "m.gguf", tensors)
    _round_trip(plain)
    reader = gguf.GGUFReader(tmp_path / "m.racgguf")
    assert [(t.name, t.tensor_type.name) for t in reader.tensors] == [("a", "I8"), ("b", "F32")]
    assert reader.fields["general.name"].contents() == "tiny ☃"
    assert reader.fields["racgguf.sha256"].contents() == file_sha256(plain)


def test_a_container_measures_like_its_file(tmp_path: Path) -> None:
    """Types, shapes and zeros are those of the plain file, sizes are the stored ones."""
    tensors = {kind: (kind, random_rows(kind, 16, 256, 0.6)) for kind in PACKABLE if kind != "f32"}
    plain = write_gguf(tmp_path / "m.gguf", tensors)
    stored = [row.stored_bytes for row in _round_trip(plain)]
    with np.errstate(all="ignore"):
        fields, rows = measure(tmp_path / "m.racgguf")
        plain_fields, expected = measure(plain)
    assert [(r.name, r.shape, r.type, r.zeros) for r in rows] == [
        (r.name, r.shape, r.type, r.zeros) for r in expected
    ]
    assert [row.size_bytes for row in rows] == stored
    assert {row.packing for row in rows} == {"bitmask"}
    assert fields["general.name"] == plain_fields["general.name"]


@pytest.mark.parametrize("where", ["between tensors", "behind the last one", "a container"])
def test_what_cannot_be_restored_is_refused(tmp_path: Path, where: str) -> None:
    """Bytes that the form has no place for, and a container in a container."""
    tensors = {name: ("f32", random_rows("f32", 1, 7, 0.0)) for name in "ab"}
    plain = write_gguf(tmp_path / "m.gguf", tensors)
    data = bytearray(plain.read_bytes())
    if where == "a container":
        bitmask.pack_file(plain, tmp_path / "m.racgguf")
        data = bytearray((tmp_path / "m.racgguf").read_bytes())
    elif where == "between tensors":
        data[-33] = 1
    else:
        data += bytes(100)
    plain.write_bytes(data)
    code = "already-packed" if where == "a container" else "cannot-be-packed"
    with raises(code, str(plain)):
        bitmask.pack_file(plain, tmp_path / "n.racgguf")
    assert not [file for file in tmp_path.iterdir() if file.name.startswith((".", "n"))]


def test_unpacking_checks_its_place_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, a wrong suffix and a full disk are errors before anything is written."""
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("f16", random_rows("f16", 8, 256, 0.5))})
    with raises("wrong-file-name", "*.racgguf"):
        bitmask.pack_file(plain, tmp_path / "m.bin")
    bitmask.pack_file(plain, tmp_path / "m.racgguf")
    container = racgguf.Container.open(tmp_path / "m.racgguf")
    with raises("no-out-folder", f"mkdir -p {tmp_path / 'nowhere'}"):
        container.unpack(tmp_path / "nowhere" / "m.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with raises("disk-full", str(tmp_path)):
        container.unpack(tmp_path / "out.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "m.racgguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_unpacking_again_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """The hidden partial file of a process that is gone does not stay for ever."""
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("f16", random_rows("f16", 8, 256, 0.5))})
    bitmask.pack_file(plain, tmp_path / "m.racgguf")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    (tmp_path / f".out.gguf.{gone.pid}.partial").write_bytes(b"half")
    racgguf.Container.open(tmp_path / "m.racgguf").unpack(tmp_path / "out.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "m.racgguf", "out.gguf"]


def test_the_cache_unpacks_once_and_repairs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is reused while its hash is right, and replaced when it is not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = write_gguf(tmp_path / "m.gguf", {"w": ("q4_0", random_rows("q4_0", 16, 256, 0.5))})
    bitmask.pack_file(plain, tmp_path / "m.racgguf")
    file = racgguf.unpack_to_cache(tmp_path / "m.racgguf")
    assert file.read_bytes() == plain.read_bytes()
    inode = file.stat().st_ino
    assert racgguf.unpack_to_cache(tmp_path / "m.racgguf").stat().st_ino == inode
    file.write_bytes(b"damaged")
    assert racgguf.unpack_to_cache(tmp_path / "m.racgguf").read_bytes() == plain.read_bytes()
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc"
)
def test_memory_stays_far_below_the_file(tmp_path: Path) -> None:
    """Packing and unpacking 134 MB take less than 40 MB beyond what the imports take."""
    rows = random_rows("f16", 4096, 2048, 0.5)
    tensors = {f"w{number}": ("f16", rows) for number in range(8)}
    plain = write_gguf(tmp_path / "m.gguf", tensors)
    code = (
        "import re, sys; from pathlib import Path\n"
        "from racdeploy.packing import racgguf; from racdeploy.packing.packers import bitmask\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status.read_text())[1])\n"
        "plain, before = Path(sys.argv[1]), peak()\n"
        "bitmask.pack_file(plain, plain.with_suffix('.racgguf'))\n"
        "racgguf.Container.open(plain.with_suffix('.racgguf')).unpack(plain.with_suffix('.out'))\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, plain], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 40e6
