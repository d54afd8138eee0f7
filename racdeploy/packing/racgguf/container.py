"""Open a .racgguf file, and give the bytes of the plain file that it stands for.

What the header tells is checked when the file is opened, the chunks as they are unpacked, and the
SHA-256 of the whole at the end. What is written is whole or absent.
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

from racdeploy import packing as packings
from racdeploy.errors import ArtifactError, EnvironmentFailure
from racdeploy.files import writing as files
from racdeploy.files.caches import cache_folder
from racdeploy.files.checked import has_sha256
from racdeploy.files.ownership import make_private
from racdeploy.tensors.gguf_header import (
    FIXED_BYTES,
    Header,
    TensorInfo,
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
PACKED_TYPE = 24  # I8, which no tensor of a model has: other readers list the packed bytes under it
PLAIN = "plain"
_COPY_AGAIN = "copy it again, or pack it again"
READ_BYTES = 1 << 18
_HEAP_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, plain and as it is stored; dimensions and type are those of the plain file."""

    name: str
    dimensions: tuple[int, ...]  # row length first
    ggml_type: int
    packing: str  # ``plain`` or the container's
    plain_bytes: int
    stored_bytes: int
    position: int  # of its first stored byte


@dataclass(frozen=True)
class Container:
    """A checked container; size and SHA-256 are those of the plain file."""

    path: Path
    header: Header
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
            remedy = error.remedy or _COPY_AGAIN
            raise ArtifactError(error.code, f"{path}: {error.message}", remedy=remedy) from error

    @property
    def metadata(self) -> dict[str, Value]:
        """The metadata of the plain file; arrays as in :class:`Header`."""
        return {key: value for key, value in self.header.values.items() if key not in KEYS}

    def chunks(self, tensor: StoredTensor) -> Iterator[NDArray[np.uint8]]:
        """Yield the plain bytes of a tensor, whole blocks at a time where it is packed."""
        with self.path.open("rb", buffering=0) as stream:
            yield from unpack_stored(tensor, Source(stream))

    def plain(self) -> Iterator[memoryview]:
        """Yield the bytes of the plain file, without checking their SHA-256."""
        # glibc keeps twice as much freed memory as the largest block it has freed. Without this
        # one, whose pages are never touched, every chunk faults its pages in again: half the speed.
        np.empty(_HEAP_BYTES, dtype=np.uint8)

        yield memoryview(self._plain_header)
        written = len(self._plain_header)

        with self.path.open("rb", buffering=0) as stream:
            stored = Source(stream)
            for tensor in self.tensors:
                start = padded(written, self.header.alignment)
                if start > written:
                    yield memoryview(bytes(start - written))

                try:
                    for chunk in unpack_stored(tensor, stored):
                        yield chunk.data
                except ArtifactError as error:
                    message = f"{self.path}: the tensor {tensor.name!r} is damaged: {error.message}"
                    raise ArtifactError("damaged-packing", message, remedy=_COPY_AGAIN) from error

                written = start + tensor.plain_bytes

        yield memoryview(bytes(self.size_bytes - written))

    def check_sha256(self) -> None:
        """Unpack to nowhere; an ArtifactError says that the plain file would be another one."""
        self._write(None)

    def unpack(self, out: Path) -> None:
        """Write the plain file, whole or not at all."""
        files.require_space(out.parent, self.size_bytes, "choose another place")
        with files.atomic_file(out) as stream:
            self._write(stream)

    def _write(self, stream: BinaryIO | None) -> None:
        digest = hashlib.sha256()
        for piece in self.plain():
            digest.update(piece)
            if stream is not None:
                stream.write(piece)

        found = digest.hexdigest()
        if found != self.sha256:
            raise ArtifactError(
                "damaged-packing",
                f"{self.path} unpacks to a file with SHA-256 {found[:16]}…, "
                f"not {self.sha256[:16]}…",
                remedy=_COPY_AGAIN,
            )

    @cached_property
    def _plain_header(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(FIXED_BYTES)
            metadata = stream.read(self.header.starts[KEYS[0]] - FIXED_BYTES)

        keys = len(self.header.values) - len(KEYS)
        fixed = struct.pack("<4sIQQ", b"GGUF", 3, len(self.tensors), keys)

        infos = [(t.name, t.dimensions, t.ggml_type, t.plain_bytes) for t in self.tensors]
        return fixed + metadata + tensor_infos(infos, self.header.alignment)


def unpacked(path: Path) -> Path:
    """Return the plain GGUF file of a container, unpacked into the user's cache on first use.

    It lies there under its SHA-256, which is checked on every use, so containers of the same model
    share it, and may be removed at any time.
    """
    container = Container.open(path)
    file = cache_folder("unpacked") / f"{container.sha256}.gguf"
    if file.is_file() and has_sha256(file, container.sha256):
        return file

    with files.disk_errors(file):
        make_private(file.parent)
    container.unpack(file)

    if not has_sha256(file, container.sha256):
        raise EnvironmentFailure(
            "written-file-differs",
            f"{file} does not hold what was written there",
            remedy="check the disk, then run the same command",
        )
    return file


def tensor_infos(tensors: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> bytes:
    """Return the infos of tensors (name, dimensions, type, size) that lie one after another."""
    infos = b""
    offset = 0

    for name, dimensions, ggml_type, size_bytes in tensors:
        count = len(dimensions)
        infos += pack_text(name) + struct.pack(f"<I{count}Q", count, *dimensions)
        infos += struct.pack("<IQ", ggml_type, offset)
        offset = padded(offset + size_bytes, alignment)

    return infos


def pack_text(value: str) -> bytes:
    """Return a string as GGUF has it."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _check(path: Path, header: Header) -> Container:
    _check_keys(header.values)
    version, packing, size_bytes, sha256, recorded = (header.values[key] for key in KEYS)

    stored = packings.names("gguf")
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
        raise ArtifactError("damaged-packing", "racgguf.tensors is no array of u64")

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


def _check_keys(values: dict[str, Value]) -> None:
    own = [key for key in values if key.startswith("racgguf.")]
    if not own:
        message = "it is a plain GGUF file, no .racgguf container"
        raise ArtifactError("plain-gguf", message, remedy="use it as it is")

    version = values.get(KEYS[0])
    if isinstance(version, int) and version != VERSION:
        remedy = "update racdeploy, or pack the plain file again with this one"
        raise ArtifactError(
            "unknown-packing-version",
            f"container version {version!r}; known is {VERSION}",
            remedy=remedy,
        )

    if own != list(KEYS) or list(values)[-len(KEYS) :] != own:
        raise ArtifactError(
            "damaged-packing",
            "it is no .racgguf container: its five keys are not at the end of the metadata",
        )


def _read_tensors(header: Header, recorded: list[int], packing: str) -> tuple[StoredTensor, ...]:
    """Read of each tensor its plain type, the number of its dimensions, and these."""
    tensors = []
    place = 0
    for info in header.tensors:
        # One dimension more than a tensor can have is enough to refuse it.
        count = 0
        if place + 1 < len(recorded):
            count = min(recorded[place + 1], 5)
        stop = place + 2 + count
        if stop > len(recorded):
            raise ArtifactError("damaged-packing", "racgguf.tensors ends early")

        dimensions = tuple(recorded[place + 2 : stop])
        tensor = _describe(info, dimensions, recorded[place], packing)
        if tensor.packing == PLAIN and dimensions != info.dimensions:
            raise ArtifactError(
                "damaged-packing", f"the dimensions of {info.name!r} are not those recorded"
            )
        tensors.append(tensor)
        place = stop

    if place != len(recorded):
        raise ArtifactError(
            "damaged-packing", "racgguf.tensors records more tensors than there are"
        )

    return tuple(tensors)


def _describe(
    info: TensorInfo, dimensions: tuple[int, ...], ggml_type: int, packing: str
) -> StoredTensor:
    plain_bytes = tensor_bytes(dimensions, ggml_type)
    if info.ggml_type == ggml_type:
        packing = PLAIN
    elif info.ggml_type != PACKED_TYPE:
        message = f"{info.name!r} has type {info.ggml_type} and is recorded as {ggml_type}"
        raise ArtifactError("damaged-packing", message)

    stored = info.size_bytes, info.position
    tensor = StoredTensor(info.name, dimensions, ggml_type, packing, plain_bytes, *stored)
    if reason := packings.load_gguf(packing).refuse_stored(tensor):
        raise ArtifactError("damaged-packing", f"{info.name!r} {reason}")

    return tensor


def _check_size(container: Container) -> None:
    alignment = container.header.alignment
    size_bytes = len(container._plain_header)
    for tensor in container.tensors:
        size_bytes = padded(size_bytes, alignment) + tensor.plain_bytes
    if not size_bytes <= container.size_bytes <= padded(size_bytes, alignment):
        raise ArtifactError(
            "damaged-packing",
            f"its tensors make {size_bytes} bytes and racgguf.size_bytes is {container.size_bytes}",
        )


def unpack_stored(tensor: StoredTensor, source: Source) -> Iterator[NDArray[np.uint8]]:
    """Yield the plain bytes of a tensor, as its packing restores them."""
    source.start(tensor.position, tensor.stored_bytes)
    yield from packings.load_gguf(tensor.packing).unpack_tensor(tensor, source)
    if source.left:
        raise ArtifactError("damaged-packing", f"{source.left} bytes follow the last chunk")


class Source:
    """The stored bytes of a tensor, read ahead; ``left`` counts those not taken yet."""

    def __init__(self, stream: BinaryIO) -> None:
        self.left = 0
        self._stream = stream
        self._ahead = np.empty(0, dtype=np.uint8)
        self._taken = 0  # of those ahead

    def start(self, position: int, size_bytes: int) -> None:
        """Go to the first of the bytes of a tensor."""
        self._stream.seek(position)
        self._ahead = self._ahead[:0]
        self._taken = 0
        self.left = size_bytes

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return that many further bytes; an ArtifactError says that there are fewer."""
        if count > self.left:
            raise ArtifactError(
                "damaged-packing", f"{count} bytes are wanted where {self.left} are left"
            )
        if self._taken + count > self._ahead.size:
            self._read(count)

        start = self._taken
        self._taken += count
        self.left -= count
        return self._ahead[start : self._taken]

    def _read(self, count: int) -> None:
        rest = self._ahead[self._taken :]
        wanted = max(count, min(self.left, READ_BYTES)) - rest.size
        read = np.frombuffer(self._stream.read(wanted), dtype=np.uint8)
        if read.size < wanted:
            raise ArtifactError("damaged-packing", "the file ends early")
        self._ahead = np.concatenate([rest, read]) if rest.size else read
        self._taken = 0
