"""Open a .racgguf container and restore the bytes of its plain file.

The header is checked when the file is opened, chunks as they are unpacked, and the SHA-256 of the
plain file at the end. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from racdeploy import packing as packings
from racdeploy.errors import ArtifactError
from racdeploy.files import writing as files
from racdeploy.files.caches import cache_folder
from racdeploy.files.ownership import (
    OTHERS_WRITE,
    check_private,
    explain_foreign,
    make_private,
    restrict_to_owner,
)
from racdeploy.files.sha256_cache import has_sha256
from racdeploy.packing.block_layouts import Bytes
from racdeploy.tensors.gguf_header import (
    FIXED_HEADER_BYTES,
    Dimensions,
    GgufHeader,
    MetadataValue,
    TensorInfo,
    align_up,
    count_tensor_bytes,
    read_header,
)

SUFFIX = ".racgguf"
VERSION = 2
KEYS = (
    "racgguf.version",
    "racgguf.packing",
    "racgguf.size_bytes",
    "racgguf.sha256",
    "racgguf.tensors",
)
PACKED_TYPE = 24  # I8, which no tensor of a model has: other readers show packed bytes as I8
PLAIN = "plain"
_COPY_AGAIN = "copy it again, or pack it again"
READ_BYTES = 1 << 18
_HEAP_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a container, with its dimensions and type in the plain file."""

    name: str
    dimensions: Dimensions  # row length first
    ggml_type: int
    packing: str  # ``plain`` or the container's
    plain_bytes: int
    stored_bytes: int
    position: int  # of its first stored byte


@dataclass(frozen=True)
class Container:
    """An opened and checked container; size and SHA-256 are those of the plain file."""

    path: Path
    header: GgufHeader
    packing: str  # of the tensors that are not plain
    tensors: tuple[StoredTensor, ...]
    size_bytes: int
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Container:
        """Open a container and check everything but its chunks."""
        header = read_header(path, (3,))
        try:
            return _check(path, header)
        except ArtifactError as error:
            raise ArtifactError(
                error.code, f"{path}: {error.message}", remedy=error.remedy or _COPY_AGAIN
            ) from error

    @property
    def metadata(self) -> dict[str, MetadataValue]:
        """Metadata of the plain file; arrays as in :class:`GgufHeader`."""
        return {key: value for key, value in self.header.metadata.items() if key not in KEYS}

    def iter_chunks(self, tensor: StoredTensor) -> Iterator[Bytes]:
        """Yield the plain bytes of a tensor; those of a packed one in whole blocks."""
        with self.path.open("rb", buffering=READ_BYTES) as stream:
            yield from unpack_stored(tensor, ByteReader(stream))

    def iter_plain_bytes(self) -> Iterator[memoryview]:
        """Yield the bytes of the plain file, without checking their SHA-256."""
        # Frees a large block, whose pages are never touched: glibc then keeps twice as much freed
        # memory. Without it, every chunk faults its pages in again, which halves the speed.
        np.empty(_HEAP_BYTES, dtype=np.uint8)

        yield memoryview(self._plain_header)
        written = len(self._plain_header)

        with self.path.open("rb", buffering=READ_BYTES) as stream:
            stored = ByteReader(stream)
            for tensor in self.tensors:
                start = align_up(written, self.header.alignment)
                if start > written:
                    yield memoryview(bytes(start - written))

                try:
                    for chunk in unpack_stored(tensor, stored):
                        yield chunk.data
                except ArtifactError as error:
                    raise ArtifactError(
                        "damaged-packing",
                        f"{self.path}: the tensor {tensor.name!r} is damaged: {error.message}",
                        remedy=_COPY_AGAIN,
                    ) from error

                written = start + tensor.plain_bytes

        yield memoryview(bytes(self.size_bytes - written))

    def check_sha256(self) -> None:
        """Unpack without writing, and raise an ArtifactError if the SHA-256 differs."""
        self._write(None)

    def unpack(self, out: Path) -> None:
        """Write the plain file to ``out``, whole or not at all."""
        files.require_space(out.parent, self.size_bytes, "choose another place")
        with files.atomic_file(out) as stream:
            self._write(stream)

    def _write(self, stream: BinaryIO | None) -> None:
        digest = hashlib.sha256()
        for piece in self.iter_plain_bytes():
            digest.update(piece)
            if stream is not None:
                stream.write(piece)

        sha256 = digest.hexdigest()
        if sha256 != self.sha256:
            raise ArtifactError(
                "damaged-packing",
                f"{self.path} unpacks to a file with SHA-256 {sha256[:16]}…, "
                f"not {self.sha256[:16]}…",
                remedy=_COPY_AGAIN,
            )

    @cached_property
    def _plain_header(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(FIXED_HEADER_BYTES)
            metadata = stream.read(self.header.key_positions[KEYS[0]] - FIXED_HEADER_BYTES)

        keys = len(self.header.metadata) - len(KEYS)
        infos = [(t.name, t.dimensions, t.ggml_type, t.plain_bytes) for t in self.tensors]
        packed_infos = pack_tensor_infos(infos, self.header.alignment)
        return pack_counts(len(infos), keys) + metadata + packed_infos


def unpack_to_cache(path: Path) -> Path:
    """Return the plain GGUF file of a container, unpacked into the user's cache on first use.

    Its name there is its SHA-256, so that containers of the same model share it; the SHA-256 is
    checked on every use. The file may be removed at any time.
    """
    container = Container.open(path)
    folder = cache_folder("unpacked")
    file = folder / f"{container.sha256}.gguf"
    with files.disk_errors(file):
        make_private(folder)
    check_private(folder, explain_foreign)

    # Whoever could write there may still have a file open: its content is replaced.
    is_doubtful = bool(folder.stat().st_mode & OTHERS_WRITE) and restrict_to_owner(folder)
    is_there = file.is_file() and not (is_doubtful or explain_foreign(file))
    if is_there and has_sha256(file, container.sha256):
        return file
    container.unpack(file)
    return file


def pack_counts(tensors: int, keys: int) -> bytes:
    """Return the first bytes of a GGUF file: format, version, and how many tensors and keys."""
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def pack_tensor_infos(tensors: list[tuple[str, Dimensions, int, int]], alignment: int) -> bytes:
    """Return the stored infos of consecutive tensors, given name, dimensions, type and size."""
    infos = b""
    offset = 0
    for name, dimensions, ggml_type, size_bytes in tensors:
        count = len(dimensions)
        infos += pack_string(name) + struct.pack(f"<I{count}Q", count, *dimensions)
        infos += struct.pack("<IQ", ggml_type, offset)
        offset = align_up(offset + size_bytes, alignment)

    return infos


def pack_string(value: str) -> bytes:
    """Return a string as GGUF stores it: its length in bytes, then UTF-8."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _check(path: Path, header: GgufHeader) -> Container:
    _check_keys(header.metadata)
    version, packing, size_bytes, sha256, recorded = (header.metadata[key] for key in KEYS)

    stored = packings.list_supported("gguf", "packing")
    known = [name for name in stored if packings.load_gguf(name).SUFFIX == SUFFIX]
    if type(version) is not int or not isinstance(packing, str) or packing not in known:
        raise ArtifactError(
            "unknown-packing-version",
            f"container version {version!r} with packing {packing!r}; "
            f"known is {VERSION} with {', '.join(map(repr, known))}",
        )

    if type(size_bytes) is not int or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
        raise ArtifactError("damaged-packing", "its size or SHA-256 of the plain file is malformed")
    if not isinstance(recorded, np.ndarray):
        raise ArtifactError("damaged-packing", "racgguf.tensors is not an array of u64")

    tensors = _read_tensors(header, recorded.tolist(), packing)
    container = Container(
        path=path,
        header=header,
        packing=packing,
        tensors=tensors,
        size_bytes=size_bytes,
        sha256=str(sha256),
    )
    _check_size(container)
    return container


def _check_keys(values: dict[str, MetadataValue]) -> None:
    own_keys = [key for key in values if key.startswith("racgguf.")]
    if not own_keys:
        raise ArtifactError(
            "plain-gguf",
            "it is a plain GGUF file, not a .racgguf container",
            remedy="use it as it is",
        )

    version = values.get(KEYS[0])
    if isinstance(version, int) and version != VERSION:
        raise ArtifactError(
            "unknown-packing-version",
            f"container version {version!r}; known is {VERSION}",
            remedy="update racdeploy, or pack the plain file again with this one",
        )

    # They have to be last: the bytes in front are then the unchanged metadata of the plain file.
    if own_keys != list(KEYS) or list(values)[-len(KEYS) :] != own_keys:
        raise ArtifactError(
            "damaged-packing",
            "it is not a .racgguf container: its five keys are not at the end of the metadata",
        )


def _read_tensors(
    header: GgufHeader, recorded: list[int], packing: str
) -> tuple[StoredTensor, ...]:
    """Return the tensors; ``recorded`` has for each its plain type, dimension count, dimensions."""
    tensors = []
    start = 0
    for info in header.tensors:
        # At most one dimension more than allowed: enough to refuse it, and a bound on the work.
        count = 0
        if start + 1 < len(recorded):
            count = min(recorded[start + 1], 5)
        stop = start + 2 + count
        if stop > len(recorded):
            raise ArtifactError("damaged-packing", "racgguf.tensors ends early")

        dimensions = tuple(recorded[start + 2 : stop])
        tensor = _describe(info, dimensions, recorded[start], packing)
        if tensor.packing == PLAIN and dimensions != info.dimensions:
            raise ArtifactError(
                "damaged-packing", f"the dimensions of {info.name!r} are not those recorded"
            )
        tensors.append(tensor)
        start = stop

    if start != len(recorded):
        raise ArtifactError(
            "damaged-packing", "racgguf.tensors records more tensors than there are"
        )

    return tuple(tensors)


def _describe(
    info: TensorInfo, dimensions: Dimensions, ggml_type: int, packing: str
) -> StoredTensor:
    plain_bytes = count_tensor_bytes(dimensions, ggml_type)
    if info.ggml_type == ggml_type:
        packing = PLAIN
    elif info.ggml_type != PACKED_TYPE:
        raise ArtifactError(
            "damaged-packing",
            f"{info.name!r} has type {info.ggml_type} and is recorded as {ggml_type}",
        )

    tensor = StoredTensor(
        name=info.name,
        dimensions=dimensions,
        ggml_type=ggml_type,
        packing=packing,
        plain_bytes=plain_bytes,
        stored_bytes=info.size_bytes,
        position=info.position,
    )
    if reason := packings.load_gguf(packing).find_damage(tensor):
        raise ArtifactError("damaged-packing", f"{info.name!r} {reason}")

    return tensor


def _check_size(container: Container) -> None:
    alignment = container.header.alignment
    size_bytes = len(container._plain_header)
    for tensor in container.tensors:
        size_bytes = align_up(size_bytes, alignment) + tensor.plain_bytes
    if not size_bytes <= container.size_bytes <= align_up(size_bytes, alignment):
        raise ArtifactError(
            "damaged-packing",
            f"its tensors make {size_bytes} bytes and racgguf.size_bytes is {container.size_bytes}",
        )


def unpack_stored(tensor: StoredTensor, source: ByteReader) -> Iterator[Bytes]:
    """Yield the plain bytes of a tensor, restored by the plugin of its packing."""
    source.seek(tensor.position, tensor.stored_bytes)
    yield from packings.load_gguf(tensor.packing).unpack_tensor(tensor, source)
    if source.remaining:
        raise ArtifactError("damaged-packing", f"{source.remaining} bytes follow the last chunk")


class ByteReader:
    """Reader of the stored bytes of a tensor.

    ``remaining`` is the number of bytes of the tensor that were not read yet.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.remaining = 0
        self._stream = stream

    def seek(self, position: int, size_bytes: int) -> None:
        """Move to the first byte of a tensor."""
        self._stream.seek(position)
        self.remaining = size_bytes

    def read(self, count: int) -> Bytes:
        """Return the next ``count`` bytes, or raise an ArtifactError if fewer remain."""
        if count > self.remaining:
            raise ArtifactError(
                "damaged-packing", f"{count} bytes are needed and only {self.remaining} remain"
            )

        data = self._stream.read(count)
        if len(data) < count:
            raise ArtifactError("damaged-packing", "the file ends early")
        self.remaining -= count
        return np.frombuffer(data, dtype=np.uint8)
