"""Packed matrices of a model in one file of the user's cache: written once, mapped ever after.

New memory is slow to get; a file that the system has cached is there already. ``kept/HASH.packed``
is the matrices one behind the other, then zeros, a table in JSON, and a trailer with the table's
size and SHA-256. It is whole or absent, and ``file_maps.cpp`` checks what kernels would follow.
Imports nothing heavy: every load passes here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from racdeploy.accel.library import cache_folder
from racdeploy.storage.gguf_header import read_header

if TYPE_CHECKING:
    from racdeploy.accel.ggml_plugin import Plugin

_TRAILER = struct.Struct("<Q32s16s")  # bytes of the table, its SHA-256, magic
_MAGIC = b"racdeploy kept 1"
_MOST_TABLE_BYTES = 1 << 28
# Written at once: the system caches each in one huge page, where its file system can.
_CHUNK_BYTES = 2 << 20
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


def model_state(path: Path) -> list[str | int]:
    """Return what tells a file from a changed one; ``OSError`` where there is none."""
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]


def use(plugin: Plugin, path: Path, names: Collection[str]) -> bool:
    """Have the next model's weights taken from its kept file; False where there is none that fits.

    Args:
        plugin: enabled for this model.
        names: of the tensors that are packed.
    """
    with contextlib.suppress(OSError), locate(path).open("rb") as stream:
        table = _read_table(stream)
        if not table or table["model"] != model_state(path) or table["form"] != plugin.form:
            return False
        matrices = table["matrices"]
        return matrices.keys() >= set(names) and plugin.keep(stream, matrices)
    return False


def write(plugin: Plugin, path: Path, names: Collection[str]) -> bool:
    """Pack a model's weights into its kept file; False where the disk has no place for it.

    Nor is it written where the system would map it in small pages, which slows products down by up
    to a quarter, unless ``RACDEPLOY_ACCEL_KEEP`` is 1. Arguments are those of :func:`use`.
    """
    scratch = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        if shutil.disk_usage(folder()).free < 2 * path.stat().st_size:
            return False
        if os.environ.get("RACDEPLOY_ACCEL_KEEP") != "1" and not _maps_huge(plugin):
            return False

        descriptor, scratch = tempfile.mkstemp(dir=folder(), prefix=".")
        with open(descriptor, "wb") as stream:
            state = _write_matrices(plugin, path, names, stream)
            stream.flush()
            os.fsync(descriptor)

        if state != model_state(path):
            return False
        os.replace(scratch, locate(path))
        return True
    except (OSError, MemoryError):  # a cache that cannot be written: packed in memory
        return False
    finally:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)


def _maps_huge(plugin: Plugin) -> bool:
    """Try with a file of one chunk: it depends on the system and on the file system."""
    with tempfile.TemporaryFile(dir=folder()) as stream:
        stream.write(bytes(_CHUNK_BYTES))
        stream.flush()
        return plugin.maps_huge(stream)


def _write_matrices(
    plugin: Plugin, path: Path, names: Collection[str], stream: IO[bytes]
) -> list[str | int]:
    """Write a whole kept file; return the state of the model before it was read."""
    state = model_state(path)
    tensors = [tensor for tensor in read_header(path).tensors if tensor.name in names]

    places: dict[str, list[int]] = {}
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
        stream.write(memoryview(pending)[:whole])
        del pending[:whole]

    # A row whose mask is damaged is read for as long as a row can be.
    slack = bytes(2 * most_columns + 1024)

    table = {"model": state, "form": plugin.form, "matrices": places}
    stream.write(pending + slack + _encode_table(table))
    return state


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


def _is_table(table: Any) -> bool:
    match table:
        case {"model": [str(), *_], "form": _, "matrices": dict(places), **rest} if not rest:
            return all(_is_place(place) for place in places.values())
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
        return table is not None and table["model"] == model_state(Path(table["model"][0]))
    return False
