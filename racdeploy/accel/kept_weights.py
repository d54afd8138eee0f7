"""Packed matrices of a model in one file of the user's cache: written once, mapped ever after.

New memory is slow to get; a file that the system has cached is there already. ``kept/HASH.packed``
is the matrices one behind the other, then zeros, a table in JSON with a hash of every piece, and a
trailer with the table's size and SHA-256. It is whole or absent. All pieces are compared with their
hashes once, and some whenever it is mapped; ``file_maps.cpp`` checks what kernels would follow.
Only a folder that nobody else may write is used. Imports nothing heavy: every load passes here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from racdeploy.accel.library import cache_folder
from racdeploy.errors import EnvironmentFailure
from racdeploy.storage.checked import State, check_once, file_state
from racdeploy.storage.files import atomic_file
from racdeploy.storage.gguf_header import read_header
from racdeploy.storage.ownership import explain_foreign, make_private, open_own

if TYPE_CHECKING:
    from racdeploy.accel.ggml_plugin import Plugin

_TRAILER = struct.Struct("<Q32s16s")  # bytes of the table, its SHA-256, magic
_MAGIC = b"racdeploy kept 2"
_MOST_TABLE_BYTES = 1 << 28
# Written at once: the system caches each in one huge page, where its file system can.
_CHUNK_BYTES = 2 << 20
_PIECE_BYTES = 1 << 20  # that have one hash
_PIECES_A_LOAD = 4  # that are compared every time
_ALIGNMENT = 64
_FORGOTTEN_S = 3600.0  # a file that is still unfinished then was left behind


def is_wanted() -> bool:
    """Return whether files are kept: not where ``RACDEPLOY_ACCEL_KEEP`` is 0."""
    return os.environ.get("RACDEPLOY_ACCEL_KEEP") != "0"


def folder() -> Path:
    """Return where they are; it may not exist."""
    return cache_folder() / "kept"


def kept_files() -> list[Path]:
    """Return those that exist."""
    return sorted(folder().glob("*.packed"))


def locate(path: Path) -> Path:
    """Return the kept file of a model; it may not exist."""
    name = os.fsencode(path.resolve())
    digest = hashlib.sha256(name).hexdigest()
    return folder() / f"{digest[:32]}.packed"


def use(plugin: Plugin, path: Path, names: Collection[str]) -> bool:
    """Have the next model's weights taken from its kept file; False where there is none that fits.

    Args:
        plugin: enabled for this model.
        names: of the tensors that are packed.
    """
    file = locate(path)
    with contextlib.suppress(OSError), open(open_own(file), "rb") as stream:
        table = _read_table(stream)
        if not table or table["model"] != file_state(path) or table["form"] != plugin.form:
            return False

        matrices = table["matrices"]
        if not matrices.keys() >= set(names) or not _is_intact(file, stream, table["pieces"]):
            return False
        return plugin.keep(stream, matrices)
    return False


def write(plugin: Plugin, path: Path, names: Collection[str]) -> bool:
    """Pack a model's weights into its kept file; False where the disk has no place for it.

    Nor is it written where the system would map it in small pages, which slows products down by up
    to a quarter, unless ``RACDEPLOY_ACCEL_KEEP`` is 1. Arguments are those of :func:`use`.
    """
    try:
        make_private(folder())
        if explain_foreign(folder()):
            return False

        _sweep()
        if shutil.disk_usage(folder()).free < 2 * path.stat().st_size:
            return False
        if os.environ.get("RACDEPLOY_ACCEL_KEEP") != "1" and not _maps_huge(plugin):
            return False

        with atomic_file(locate(path), mode=0o600) as stream:
            state = _write_matrices(plugin, path, names, stream)
            stream.flush()
            os.fsync(stream.fileno())

            if state != file_state(path):
                raise OSError("the model changed while it was packed")
        return True
    except (OSError, MemoryError, EnvironmentFailure):  # no place for it: packed in memory
        return False


def _maps_huge(plugin: Plugin) -> bool:
    """Try with a file of one chunk: it depends on the system and on the file system."""
    with tempfile.TemporaryFile(dir=folder()) as stream:
        stream.write(bytes(_CHUNK_BYTES))
        stream.flush()
        return plugin.maps_huge(stream)


def _write_matrices(plugin: Plugin, path: Path, names: Collection[str], stream: IO[bytes]) -> State:
    """Write a whole kept file; return the state of the model before it was read."""
    state = file_state(path)
    tensors = [tensor for tensor in read_header(path).tensors if tensor.name in names]

    places: dict[str, list[int]] = {}
    pieces: list[str] = []
    pending = bytearray()
    end = 0
    most_columns = 0
    for tensor, (matrix, packed) in zip(tensors, plugin.pack(path, tensors), strict=True):
        places[tensor.name] = [*matrix, end, len(packed)]
        most_columns = max(most_columns, tensor.dimensions[0])

        padding = bytes(-len(packed) % _ALIGNMENT)
        pending += packed
        pending += padding
        end += len(packed) + len(padding)

        whole = len(pending) // _CHUNK_BYTES * _CHUNK_BYTES
        pieces += _hash_pieces(memoryview(pending)[:whole])
        stream.write(memoryview(pending)[:whole])
        del pending[:whole]

    # A row whose mask is damaged is read for as long as a row can be.
    pending += bytes(2 * most_columns + 1024)
    pieces += _hash_pieces(memoryview(pending))

    table = {"model": state, "form": plugin.form, "matrices": places, "pieces": pieces}
    stream.write(pending + _encode_table(table))
    return state


def _hash_pieces(data: memoryview) -> list[str]:
    starts = range(0, len(data), _PIECE_BYTES)
    return [_hash_piece(data[start : start + _PIECE_BYTES]) for start in starts]


def _hash_piece(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _is_intact(file: Path, stream: IO[bytes], pieces: list[str]) -> bool:
    """Compare all pieces with their hashes where the file is not known, and then some of them."""
    descriptor = stream.fileno()

    def is_right(index: int) -> bool:
        start = index * _PIECE_BYTES
        length = min(_PIECE_BYTES, _data_bytes(stream) - start)
        return _hash_piece(os.pread(descriptor, max(0, length), start)) == pieces[index]

    def are_all_right() -> bool:
        enough = len(pieces) * _PIECE_BYTES >= _data_bytes(stream)
        return enough and all(map(is_right, range(len(pieces))))

    key = hashlib.sha256("".join(pieces).encode()).hexdigest()
    if not check_once(file, key, are_all_right, records=cache_folder() / "checked"):
        return False

    some = random.sample(range(len(pieces)), min(_PIECES_A_LOAD, len(pieces)))
    return all(map(is_right, some))


def _encode_table(table: dict[str, Any]) -> bytes:
    text = json.dumps(table).encode()
    digest = hashlib.sha256(text).digest()
    return text + _TRAILER.pack(len(text), digest, _MAGIC)


def _read_table(stream: IO[bytes]) -> dict[str, Any] | None:
    """Return the table of a kept file; None where it is not whole."""
    descriptor = stream.fileno()
    end = os.fstat(descriptor).st_size - _TRAILER.size
    if end < 0:
        return None

    trailer = os.pread(descriptor, _TRAILER.size, end)
    length, digest, magic = _TRAILER.unpack(trailer)
    if magic != _MAGIC or length > min(_MOST_TABLE_BYTES, end):
        return None

    text = os.pread(descriptor, length, end - length)
    if hashlib.sha256(text).digest() != digest:
        return None

    table: dict[str, Any] = json.loads(text)
    return table if _is_table(table) else None


def _data_bytes(stream: IO[bytes]) -> int:
    """Return the bytes in front of the table of a kept file that is whole."""
    descriptor = stream.fileno()
    end = os.fstat(descriptor).st_size - _TRAILER.size
    length, _, _ = _TRAILER.unpack(os.pread(descriptor, _TRAILER.size, end))
    return end - int(length)


def _is_table(table: Any) -> bool:
    match table:
        case {
            "model": [str(), *_],
            "form": _,
            "matrices": dict(places),
            "pieces": list(pieces),
            **rest,
        } if not rest:
            hashes = all(isinstance(piece, str) for piece in pieces)
            return hashes and all(_is_place(place) for place in places.values())
    return False


def _is_place(place: Any) -> bool:
    match place:  # number format, pattern, rows, columns, first byte, bytes
        case [int(), int(), int(), int(), int(), int()]:
            return True
    return False


def _sweep() -> None:
    """Delete the files of models that are gone or have changed, and what was left unfinished."""
    for file in folder().iterdir():
        with contextlib.suppress(OSError):
            if file.name.startswith("."):
                stale = time.time() - file.stat().st_mtime > _FORGOTTEN_S
            else:
                stale = not _is_current(file)

            if stale:
                file.unlink()


def _is_current(file: Path) -> bool:
    with file.open("rb") as stream:
        table = _read_table(stream)

    with contextlib.suppress(OSError):
        return table is not None and table["model"] == file_state(Path(table["model"][0]))
    return False
