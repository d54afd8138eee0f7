"""Open a .racgguf file, and give the bytes of the plain file that it stands for.

Everything that can be known from the header is checked when the file is opened; the chunks are checked as they are
unpacked, and the SHA-256 of the whole at the end. What is written is whole or absent.
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
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.chunks import CHUNK_WEIGHTS, LEAST_WORD_WEIGHTS, read_table, unpack_chunk
from racdeploy.packing.layouts import LAYOUTS, Layout
from racdeploy.storage.files import atomic_file, remove_leftovers, require_space
from racdeploy.storage.gguf_header import (
    FIXED_BYTES,
    Header,
    Value,
    padded,
    read_header,
    tensor_bytes,
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
PACKED_TYPE = 24  # I8
_READ_BYTES = 1 << 18
_HEAP_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, plain and as it is stored.

    Args:
        name: in both files.
        dimensions: in the plain file, row length first.
        ggml_type: in the plain file.
        packed: whether it is stored packed.
        plain_bytes: size in the plain file.
        stored_bytes: size in the container.
        position: of its first stored byte.
    """

    name: str
    dimensions: tuple[int, ...]
    ggml_type: int
    packed: bool
    plain_bytes: int
    stored_bytes: int
    position: int


@dataclass(frozen=True)
class Container:
    """A checked container.

    Args:
        path: the file.
        header: its own header.
        tensors: in file order.
        size_bytes: of the plain file.
        sha256: of the plain file.
    """

    path: Path
    header: Header
    tensors: tuple[StoredTensor, ...]
    size_bytes: int
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Container:
        """Open a container and check everything but its chunks.

        Raises:
            ArtifactError: it is no container of this version, or a damaged one.
        """
        header = read_header(path, (3,))
        try:
            return _checked(path, header)
        except ArtifactError as error:
            remedy = error.remedy or "copy it again, or pack it again"
            raise ArtifactError(f"{path}: {error.message}", remedy=remedy) from error

    @property
    def metadata(self) -> dict[str, Value]:
        """The metadata of the plain file; arrays as in :class:`Header`."""
        return {key: value for key, value in self.header.values.items() if key not in KEYS}

    def chunks(self, tensor: StoredTensor) -> Iterator[NDArray[np.uint8]]:
        """Yield the plain bytes of a tensor, whole blocks at a time where it is packed.

        Raises:
            ArtifactError: its chunks are damaged.
        """
        with self.path.open("rb", buffering=0) as stream:
            yield from _unpack(tensor, _Stored(stream))

    def plain(self) -> Iterator[memoryview]:
        """Yield the bytes of the plain file, without checking their SHA-256.

        Raises:
            ArtifactError: a chunk is damaged.
        """
        # glibc keeps as much freed memory as twice the largest block it has freed. Without this one, whose pages are
        # never touched, every chunk faults its pages in again, at half the speed.
        np.empty(_HEAP_BYTES, dtype=np.uint8)
        header, alignment = self._plain_header, self.header.alignment
        yield memoryview(header)
        written = len(header)
        with self.path.open("rb", buffering=0) as stream:
            stored = _Stored(stream)
            for tensor in self.tensors:
                if gap := padded(written, alignment) - written:
                    yield memoryview(bytes(gap))
                try:
                    yield from (chunk.data for chunk in _unpack(tensor, stored))
                except ArtifactError as error:
                    message = f"{self.path}: the tensor {tensor.name!r} is damaged: {error.message}"
                    raise ArtifactError(
                        message, remedy="copy it again, or pack it again"
                    ) from error
                written += gap + tensor.plain_bytes
        yield memoryview(bytes(self.size_bytes - written))

    def check_sha256(self) -> None:
        """Unpack to nowhere.

        Raises:
            ArtifactError: the plain file would be another one.
        """
        self._write(None)

    def unpack(self, out: Path) -> None:
        """Write the plain file, whole or not at all; what killed processes left of it is removed.

        Raises:
            ArtifactError: a chunk is damaged, or the plain file is not the recorded one.
            EnvironmentFailure: the disk is full or not writable.
        """
        remove_leftovers(out)
        require_space(out.parent, self.size_bytes, "choose another place")
        with atomic_file(out) as stream:
            self._write(stream)

    def _write(self, stream: BinaryIO | None) -> None:
        digest = hashlib.sha256()
        for piece in self.plain():
            digest.update(piece)
            if stream is not None:
                stream.write(piece)
        if digest.hexdigest() != self.sha256:
            raise ArtifactError(
                f"{self.path} unpacks to a file with SHA-256 {digest.hexdigest()[:16]}…, not {self.sha256[:16]}…",
                remedy="copy it again, or pack it again",
            )

    @cached_property
    def _plain_header(self) -> bytes:
        start, stop = FIXED_BYTES, self.header.starts[KEYS[0]]
        with self.path.open("rb") as stream:
            stream.seek(start)
            metadata = stream.read(stop - start)
        count = len(self.header.values) - len(KEYS)
        fixed = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), count)
        tensors = [(t.name, t.dimensions, t.ggml_type, t.plain_bytes) for t in self.tensors]
        return fixed + metadata + tensor_infos(tensors, self.header.alignment)


def tensor_infos(tensors: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> bytes:
    """Return the infos of tensors (name, dimensions, type, size) that lie one after another."""
    infos, offset = bytearray(), 0
    for name, dimensions, ggml_type, size_bytes in tensors:
        encoded, count = name.encode(), len(dimensions)
        infos += struct.pack(
            f"<Q{len(encoded)}sI{count}Q", len(encoded), encoded, count, *dimensions
        )
        infos += struct.pack("<IQ", ggml_type, offset)
        offset = padded(offset + size_bytes, alignment)
    return bytes(infos)


def _checked(path: Path, header: Header) -> Container:
    values = header.values
    own = [key for key in values if key.startswith("racgguf.")]
    if not own:
        raise ArtifactError(
            "it is a plain GGUF file, no .racgguf container", remedy="use it as it is"
        )
    version = values.get(KEYS[0])
    if isinstance(version, int) and version != VERSION:
        remedy = "update racdeploy, or pack the plain file again with this one"
        raise ArtifactError(f"container version {version!r}; known is {VERSION}", remedy=remedy)
    if own != list(KEYS) or list(values)[-len(KEYS) :] != own:
        raise ArtifactError(
            "it is no .racgguf container: its five keys are not at the end of the metadata"
        )
    version, packing, size_bytes, sha256, recorded = (values[key] for key in KEYS)
    if type(version) is not int or packing != "bitmask":
        raise ArtifactError(
            f"container version {version!r} with packing {packing!r}; known is {VERSION} with 'bitmask'"
        )
    if (
        type(size_bytes) is not int
        or not isinstance(sha256, str)
        or not re.fullmatch("[0-9a-f]{64}", sha256)
    ):
        raise ArtifactError("its size or SHA-256 of the plain file is malformed")
    if not isinstance(recorded, np.ndarray):
        raise ArtifactError("racgguf.tensors is no array of u64")
    container = Container(path, header, _tensors(header, recorded), size_bytes, sha256)
    _check_size(container)
    return container


def _tensors(header: Header, recorded: NDArray[np.uint64]) -> tuple[StoredTensor, ...]:
    tensors, rest = [], iter(recorded.tolist())
    try:
        for info in header.tensors:
            ggml_type, count = next(rest), next(rest)
            dimensions = tuple(next(rest) for _ in range(min(count, 5)))
            tensors.append(
                _stored(
                    info.name, dimensions, ggml_type, info.ggml_type, info.size_bytes, info.position
                )
            )
            if not tensors[-1].packed and dimensions != info.dimensions:
                raise ArtifactError(f"the dimensions of {info.name!r} are not those recorded")
    except (StopIteration, RuntimeError) as error:
        raise ArtifactError("racgguf.tensors ends early") from error
    if next(rest, None) is not None:
        raise ArtifactError("racgguf.tensors records more tensors than there are")
    return tuple(tensors)


def _stored(
    name: str,
    dimensions: tuple[int, ...],
    ggml_type: int,
    stored_type: int,
    stored_bytes: int,
    position: int,
) -> StoredTensor:
    plain_bytes = tensor_bytes(dimensions, ggml_type)
    packed = stored_type == PACKED_TYPE != ggml_type
    if packed and ggml_type not in LAYOUTS:
        raise ArtifactError(f"{name!r} is packed and of type {ggml_type}, which cannot be packed")
    if not packed and stored_type != ggml_type:
        raise ArtifactError(f"{name!r} has type {stored_type} and is recorded as {ggml_type}")
    if packed:
        _check_stored(name, LAYOUTS[ggml_type], plain_bytes, stored_bytes)
    return StoredTensor(name, dimensions, ggml_type, packed, plain_bytes, stored_bytes, position)


def _check_stored(name: str, layout: Layout, plain_bytes: int, stored_bytes: int) -> None:
    """Refuse what cannot be a packed tensor; so the work of unpacking is bounded by the size of the file."""
    blocks = plain_bytes // layout.block_bytes
    weights = blocks * layout.block_weights
    least_bytes = 5 * blocks if layout.in_words else weights // 8
    if stored_bytes < least_bytes:
        raise ArtifactError(
            f"{name!r} is stored in {stored_bytes} bytes, less than the {least_bytes} of its mask"
        )
    if layout.in_words and weights < LEAST_WORD_WEIGHTS:
        raise ArtifactError(
            f"{name!r} is packed and has {weights} weights, fewer than {LEAST_WORD_WEIGHTS}"
        )


def _check_size(container: Container) -> None:
    alignment = container.header.alignment
    size_bytes = len(container._plain_header)
    for tensor in container.tensors:
        size_bytes = padded(size_bytes, alignment) + tensor.plain_bytes
    if not size_bytes <= container.size_bytes <= padded(size_bytes, alignment):
        raise ArtifactError(
            f"its tensors make {size_bytes} bytes and racgguf.size_bytes is {container.size_bytes}"
        )


def _unpack(tensor: StoredTensor, stored: _Stored) -> Iterator[NDArray[np.uint8]]:
    stored.start(tensor)
    if not tensor.packed:
        while stored.left:
            yield stored.take(min(stored.left, _READ_BYTES))
        return
    layout = LAYOUTS[tensor.ggml_type]
    weights = tensor.plain_bytes // layout.block_bytes * layout.block_weights
    table = read_table(layout, stored.take)
    while weights:
        chunk = unpack_chunk(layout, stored.take, table, min(weights, CHUNK_WEIGHTS))
        weights -= chunk.size // layout.block_bytes * layout.block_weights
        yield chunk
    if stored.left:
        raise ArtifactError(f"{stored.left} bytes follow the last chunk")


class _Stored:
    """The stored bytes of a tensor, read ahead; ``left`` counts those not taken yet."""

    def __init__(self, stream: BinaryIO) -> None:
        self.left = 0
        self._stream = stream
        self._ahead = np.empty(0, dtype=np.uint8)
        self._taken = 0  # of those ahead

    def start(self, tensor: StoredTensor) -> None:
        """Go to the first byte of a tensor."""
        self._stream.seek(tensor.position)
        self._ahead, self._taken, self.left = self._ahead[:0], 0, tensor.stored_bytes

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return that many further bytes.

        Raises:
            ArtifactError: there are fewer.
        """
        if count > self.left:
            raise ArtifactError(f"{count} bytes are wanted where {self.left} are left")
        if self._taken + count > self._ahead.size:
            self._read(count)
        piece = self._ahead[self._taken : self._taken + count]
        self._taken += count
        self.left -= count
        return piece

    def _read(self, count: int) -> None:
        rest = self._ahead[self._taken :]
        wanted = max(count, min(self.left, _READ_BYTES)) - rest.size
        read = np.frombuffer(self._stream.read(wanted), dtype=np.uint8)
        if read.size < wanted:
            raise ArtifactError("the file ends early")
        self._ahead = np.concatenate([rest, read]) if rest.size else read
        self._taken = 0
