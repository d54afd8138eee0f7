"""Packed matrices of a model in one file of the user's cache: written once, mapped by every later load.

New memory is dear, and packing fills as much of it as the packed model takes; what the system caches of a file is there
already. ``kept/HASH.packed`` holds the matrices one behind the other, then zeros, a table in JSON, and a trailer with
the table's size and SHA-256. It is written under another name, synchronized and renamed, so that a file is whole or not
there; what kernels would follow is checked in ``kept_file.cpp``. There is one for each model that exists: where one is
written, those whose model is gone or has changed are deleted. Imports nothing heavy: every load passes here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racdeploy.accel.library import cache_folder

if TYPE_CHECKING:
    from racdeploy.accel.ggml_plugin import Plugin


_TRAILER = struct.Struct("<Q32s16s")  # bytes of the table, its SHA-256, magic
_MAGIC = b"racdeploy kept 1"
_NUMBERS = 6  # of each matrix: number format, pattern, rows, columns, first byte, bytes
_MOST_TABLE_BYTES = 1 << 28
_CHUNK_BYTES = (
    2 << 20
)  # written at once: the system caches each in one huge page, where its file system can
_ALIGNMENT = 64
_FORGOTTEN_S = 3600.0  # a file that is still unfinished then was left behind


def wanted() -> bool:
    """Return whether files are kept: not where ``RACDEPLOY_ACCEL_KEEP`` is 0."""
    return os.environ.get("RACDEPLOY_ACCEL_KEEP") != "0"


def folder() -> Path:
    """Return where they lie; it may not be there."""
    return cache_folder() / "kept"


def kept_files() -> list[Path]:
    """Return those that are there."""
    return sorted(folder().glob("*.packed"))


def file_of(path: Path) -> Path:
    """Return the kept file of a model; it may not be there."""
    return folder() / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.packed"


def model_state(path: Path) -> list[str | int]:
    """Return what tells a file from a changed one.

    Raises:
        OSError: there is none.
    """
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino]


def use(plugin: Plugin, path: Path, names: Sequence[str]) -> bool:
    """Have the next model's weights taken from its kept file; False where there is none that fits.

    Args:
        plugin: enabled for this model.
        path: the GGUF file.
        names: of the tensors that are packed.
    """
    with contextlib.suppress(OSError), file_of(path).open("rb", buffering=0) as stream:
        table = _read_table(stream)
        if table is None or table["model"] != model_state(path) or table["form"] != plugin.form:
            return False
        if not set(names) <= table["matrices"].keys():
            return False
        return plugin.keep(stream, table["matrices"])
    return False


def write(plugin: Plugin, path: Path, names: Sequence[str]) -> bool:
    """Pack a model's weights into its kept file; False where the disk has no place for it.

    Nor is it written where the system would map it in small pages, which slows products down by up to a quarter, unless
    ``RACDEPLOY_ACCEL_KEEP`` is 1.

    Args:
        plugin: enabled for this model.
        path: the GGUF file.
        names: of the tensors that are packed.

    Raises:
        ArtifactError: the file ended early.
    """
    scratch = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _sweep()
        if _free_bytes() < 2 * path.stat().st_size:
            return False
        if os.environ.get("RACDEPLOY_ACCEL_KEEP") != "1" and not _maps_huge(plugin):
            return False
        descriptor, scratch = tempfile.mkstemp(dir=folder(), prefix=".")
        with open(descriptor, "wb", buffering=0) as stream:
            table = _write_matrices(plugin, path, names, stream)
            os.fsync(descriptor)
        if table["model"] != model_state(path):
            return False
        os.replace(scratch, file_of(path))
        return True
    except (OSError, MemoryError):  # a cache that cannot be written: packed in memory
        return False
    finally:
        if scratch is not None:
            with contextlib.suppress(OSError):
                os.unlink(scratch)


def _maps_huge(plugin: Plugin) -> bool:
    """Try with a file of one chunk: it depends on the system and on the file system."""
    with tempfile.TemporaryFile(dir=folder(), buffering=0) as stream:
        _write_all(stream, memoryview(bytes(_CHUNK_BYTES)))
        return plugin.maps_huge(stream)


def _write_matrices(
    plugin: Plugin, path: Path, names: Iterable[str], stream: FileIO
) -> dict[str, Any]:
    from racdeploy.storage.gguf_header import read_header

    places: dict[str, list[int]] = {}
    table: dict[str, Any] = {"model": model_state(path), "form": plugin.form, "matrices": places}
    chosen = set(names)
    tensors = [tensor for tensor in read_header(path).tensors if tensor.name in chosen]
    pending = bytearray()
    end = longest_row = 0
    for tensor, (matrix, packed) in zip(tensors, plugin.pack(path, tensors), strict=True):
        places[tensor.name] = [*matrix, end, len(packed)]
        longest_row = max(longest_row, 2 * matrix[3] + 1024)
        pending += packed
        pending += bytes(-len(packed) % _ALIGNMENT)
        end += len(packed) + -len(packed) % _ALIGNMENT
        whole = len(pending) // _CHUNK_BYTES * _CHUNK_BYTES
        _write_all(stream, memoryview(pending)[:whole])
        del pending[:whole]
    text = json.dumps(table).encode()
    # A row whose mask is damaged is read for as long as a row can be.
    pending += (
        bytes(longest_row) + text + _TRAILER.pack(len(text), hashlib.sha256(text).digest(), _MAGIC)
    )
    _write_all(stream, memoryview(pending))
    return table


def _write_all(stream: FileIO, data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


def _read_table(stream: FileIO) -> dict[str, Any] | None:
    """Return the table of a kept file; None where it is not whole."""
    size = os.fstat(stream.fileno()).st_size
    if size < _TRAILER.size:
        return None
    length, digest, magic = _TRAILER.unpack(
        os.pread(stream.fileno(), _TRAILER.size, size - _TRAILER.size)
    )
    if magic != _MAGIC or length > min(_MOST_TABLE_BYTES, size - _TRAILER.size):
        return None
    text = os.pread(stream.fileno(), length, size - _TRAILER.size - length)
    if hashlib.sha256(text).digest() != digest:
        return None
    table: dict[str, Any] = json.loads(text)
    return table if _is_table(table) else None


def _is_table(table: Any) -> bool:
    if not isinstance(table, dict) or table.keys() != {"model", "form", "matrices"}:
        return False
    matrices, model = table["matrices"], table["model"]
    if (
        not isinstance(matrices, dict)
        or not isinstance(model, list)
        or not model
        or not isinstance(model[0], str)
    ):
        return False
    return all(
        isinstance(place, list)
        and len(place) == _NUMBERS
        and all(type(number) is int for number in place)
        for place in matrices.values()
    )


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
    with file.open("rb", buffering=0) as stream:
        table = _read_table(stream)
    with contextlib.suppress(OSError):
        return table is not None and table["model"] == model_state(Path(table["model"][0]))
    return False


def _free_bytes() -> int:
    state = os.statvfs(folder())
    return state.f_bavail * state.f_frsize
