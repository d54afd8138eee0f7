"""GGUF models split into several files, whose names and folder follow from any one of them.

Source: ``llama_split_path`` in llama.cpp and ``gguf-split``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.tensors.gguf_header import GgufHeader, read_header

NUMBER_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = 99_999
_NAME = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.gguf$")


def name_part(stem: str, number: int, count: int) -> str:
    """Return the name of a file of a split model; ``number`` counts from 0."""
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{part}.gguf"


def assign_files(
    out: Path, plan: Sequence[GgufTensorPlan], part_bytes: int
) -> dict[Path, list[GgufTensorPlan]]:
    """Return the tensors of each file: of ``out``, or of the files of a split model beside it.

    Args:
        part_bytes: maximum bytes of the tensors of a file; 0: one file.
    """
    parts = split_into_parts(plan, part_bytes)
    if len(parts) == 1:
        return {out: parts[0]}
    return {
        out.with_name(name_part(out.stem, number, len(parts))): tensors
        for number, tensors in enumerate(parts)
    }


def split_into_parts(plan: Sequence[GgufTensorPlan], part_bytes: int) -> list[list[GgufTensorPlan]]:
    """Split tensors into runs of at most ``part_bytes``, or of one larger tensor; 0: one run."""
    parts: list[list[GgufTensorPlan]] = [[]]
    size_bytes = 0
    for tensor in plan:
        size_bytes += tensor.size_bytes
        if part_bytes and parts[-1] and size_bytes > part_bytes:
            parts.append([])
            size_bytes = tensor.size_bytes
        parts[-1].append(tensor)

    return parts


def read_parts(path: Path) -> list[tuple[Path, GgufHeader]]:
    """Return all files of a model with their checked headers, given the first file."""
    header = read_header(path)
    count = _read_number(header, COUNT_KEY, 1)
    if count in (0, 1):
        return [(path, header)]

    # The names of the other files follow from this one, so it has to agree with the metadata.
    match = _NAME.match(path.name)
    if match is None or count is None or not 1 < count <= MAX_PARTS or int(match[3]) != count:
        raise ArtifactError(
            "renamed-split",
            f"{path} is one of {count!r} files by its metadata, and not by its name",
            remedy="give the files their names back, as in model-00001-of-00003.gguf",
        )

    if _read_number(header, NUMBER_KEY) != 0:
        first = path.with_name(name_part(match[1], 0, count))
        raise UsageError(
            "not-first-split", f"{path} is not the first of {count} files", remedy=f"give {first}"
        )

    parts = [(path, header)]
    for number in range(1, count):
        file = path.with_name(name_part(match[1], number, count))
        parts.append((file, _read_part(file, path, number, count)))

    names = [tensor.name for _, header in parts for tensor in header.tensors]

    expected = _read_number(parts[0][1], TENSORS_KEY, len(names))
    if len(names) != expected or len(set(names)) < len(names):
        raise ArtifactError(
            "splits-differ",
            f"{path.name} and its other parts hold {len(set(names))} different tensors of"
            f" {expected!r}",
            remedy="copy all of them again, from one model",
        )

    return parts


def _read_part(file: Path, first: Path, number: int, count: int) -> GgufHeader:
    if not file.is_file():
        raise ArtifactError(
            "missing-split",
            f"{file} is missing: {first.name} is one of {count} files",
            remedy="copy it again",
        )

    header = read_header(file)
    if (_read_number(header, NUMBER_KEY), _read_number(header, COUNT_KEY)) != (number, count):
        raise ArtifactError(
            "wrong-split",
            f"{file} is another part, or of another model",
            remedy="copy it again",
        )

    return header


def _read_number(header: GgufHeader, key: str, default: int | None = None) -> int | None:
    """Return an integer of the metadata, or None if the file has another type there."""
    value = header.metadata.get(key, default)
    return value if isinstance(value, int) else None
