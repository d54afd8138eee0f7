"""Packings: ways to leave the zeros out of a file, one plugin in ``packers/`` for each.

The exporters call the plugin; a file names its packing, so that reading calls the same plugin.
Damaged or missing input is an ArtifactError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.plugins import Names
from racdeploy.quant import presets

if TYPE_CHECKING:
    from racdeploy.packing.block_layouts import Bytes
    from racdeploy.packing.onnx.packer import BaseGraphPacker
    from racdeploy.packing.racgguf import ByteReader, PackedTensor, StoredTensor


class Packing(Protocol):
    """A packing, as a module; importable without any extra.

    ``FORMATS`` are the file formats that store it: one for gguf is a :class:`GgufPacking`, one for
    onnx an :class:`OnnxPacking`. ``REQUIRES_ZEROS``: it leaves zeros out, so the quant has to keep
    them. ``KEEPS_PLAIN_FILE``: the artifact stays plain, and the packed form is the graph
    of :func:`racdeploy.sparse_kernels.accel_name` beside it.
    ``reason_for_plain`` returns why a tensor is better stored plain, or an empty string.
    """

    FORMATS: tuple[str, ...]
    REQUIRES_ZEROS: bool
    KEEPS_PLAIN_FILE: bool

    def reason_for_plain(self, quant: str, zeros_fraction: float) -> str: ...


class GgufPacking(Packing, Protocol):
    """A packing of GGUF files.

    ``SUFFIX`` is that of the file it makes. ``pack_file`` turns a finished plain file into ``out``,
    which unpacks to it byte for byte, and returns how each tensor is stored, or nothing if the file
    stays as it is. ``usage`` returns lines for the model card: what other programs have to do with
    the file at ``path``. The other two read a container: ``find_damage`` returns why a stored
    tensor cannot be one of this packing, or an empty string, and ``unpack_tensor`` yields its plain
    bytes.
    """

    SUFFIX: str

    def pack_file(self, plain: Path, out: Path) -> tuple[PackedTensor, ...]: ...

    def usage(self, path: str) -> list[str]: ...

    def find_damage(self, tensor: StoredTensor) -> str: ...

    def unpack_tensor(self, tensor: StoredTensor, source: ByteReader) -> Iterator[Bytes]: ...


class OnnxPacking(Packing, Protocol):
    """A packing of ONNX graphs: ``GraphPacker`` stores and reads the tensors of one graph."""

    GraphPacker: type[BaseGraphPacker]


def load(name: str) -> Packing:
    """Import the packing of that name."""
    return cast(Packing, plugins.load("packing", name))


def load_gguf(name: str) -> GgufPacking:
    """Import the packing of that name, which has to store GGUF files."""
    return cast(GgufPacking, plugins.load("packing", name))


def load_onnx(name: str) -> OnnxPacking:
    """Import the packing of that name, which has to store ONNX graphs."""
    return cast(OnnxPacking, plugins.load("packing", name))


def check(format_name: str, quant_name: str, packing_name: str) -> None:
    """Refuse a quant or packing that the format does not store, or a pair that does not work.

    A packing does not work with a quant that loses zeros, nor with one that it cannot pack even if
    all weights are zero. A preset is judged by the quant of most of its tensors.

    Raises:
        UsageError: with the quants or packings that would work.
    """
    preset = quant_name in plugins.list_names("presets")
    _check_stored(format_name, "presets" if preset else "quant", quant_name)
    _check_stored(format_name, "packing", packing_name)

    main_quant = presets.load(quant_name).quant if preset else quant_name
    if reason := _reason_against_pair(packing_name, main_quant):
        stored = list_supported(format_name, "quant")
        others = [name for name in stored if not _reason_against_pair(packing_name, name)]
        raise UsageError(
            "packing-unfit-for-quant",
            f"packing {packing_name!r} does not work with quant {quant_name!r}: {reason}",
            remedy=f"use packing 'plain', or one of the quants {', '.join(others)}",
        )


def _check_stored(format_name: str, kind: str, name: str) -> None:
    if format_name not in _list_formats(kind, name):
        raise UsageError(
            "not-stored-by-format",
            f"format {format_name!r} does not store {kind.removesuffix('s')} {name!r}",
            remedy=f"it stores {', '.join(list_supported(format_name, kind))}",
        )


def _reason_against_pair(packing_name: str, quant_name: str) -> str:
    packing = load(packing_name)
    if packing.REQUIRES_ZEROS and not quants.load(quant_name).preserves_zero:
        return "it leaves zeros out, and the quant does not keep them"
    return packing.reason_for_plain(quant_name, 1.0)


def _list_formats(kind: str, name: str) -> Names:
    """Return the file formats that store a preset, quant or packing."""
    if kind == "presets":
        return presets.load(name).formats
    if kind == "quant":
        return quants.load(name).formats
    return load(name).FORMATS


def list_supported(format_name: str, kind: str) -> list[str]:
    """Return the plugins of a kind that a file format stores and this machine can import."""
    stored = []
    for name in plugins.list_names(kind):
        with suppress(MissingExtraError):  # its packages are not installed here
            if format_name in _list_formats(kind, name):
                stored.append(name)
    return stored
