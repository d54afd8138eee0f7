"""Packings: how zeros are left out of a file, one plugin in ``packers/`` for each way.

The exporters ask the plugin; a file names its packing, so reading asks the same plugin again.
Whatever is read and damaged, or missing, is an ArtifactError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from racdeploy.packing.onnx.packer import Packer
    from racdeploy.packing.racgguf import PackedTensor, Source, StoredTensor


class Packing(Protocol):
    """A packing, as a module; importable without any extra.

    ``FORMATS`` store it: with gguf it is a :class:`GgufPacking`, with onnx an :class:`OnnxPacking`.
    ``REQUIRES_ZEROS`` is True where zeros are left out, ``BESIDE_PLAIN`` where the artifact stays
    plain and the packed form is a further file. ``fits`` returns why a tensor is better stored
    plain, or an empty string; ``usage`` the lines of the model card that say what other programs
    must do with the file at ``path``.
    """

    FORMATS: tuple[str, ...]
    REQUIRES_ZEROS: bool
    BESIDE_PLAIN: bool

    def fits(self, quant: str, zeros_fraction: float) -> str: ...

    def usage(self, path: str) -> list[str]: ...


class GgufPacking(Packing, Protocol):
    """A packing of GGUF files.

    ``SUFFIX`` is that of the file it makes. ``pack_file`` turns a finished plain file into ``out``,
    which unpacks to it byte for byte, and returns how each tensor is stored; nothing where the file
    stays as it is. The other two read a container: ``refuse_stored`` returns why a tensor cannot be
    one of this packing, or an empty string, and ``unpack_tensor`` yields its plain bytes.
    """

    SUFFIX: str

    def pack_file(self, plain: Path, out: Path) -> tuple[PackedTensor, ...]: ...

    def refuse_stored(self, tensor: StoredTensor) -> str: ...

    def unpack_tensor(
        self, tensor: StoredTensor, source: Source
    ) -> Iterator[NDArray[np.uint8]]: ...


class OnnxPacking(Packing, Protocol):
    """A packing of ONNX graphs: ``GraphPacker`` stores and reads the tensors of one graph."""

    GraphPacker: type[Packer]


def load(name: str) -> Packing:
    """Import the packing of that name."""
    return cast(Packing, plugins.load("packing", name))


def load_gguf(name: str) -> GgufPacking:
    """Import the packing of that name; the caller knows that GGUF stores it."""
    return cast(GgufPacking, plugins.load("packing", name))


def load_onnx(name: str) -> OnnxPacking:
    """Import the packing of that name; the caller knows that ONNX stores it."""
    return cast(OnnxPacking, plugins.load("packing", name))


def names(format_name: str) -> list[str]:
    """Return the packings that a file format stores."""
    return [name for name in plugins.names("packing") if format_name in load(name).FORMATS]


def check(format_name: str, quant_name: str, packing_name: str) -> None:
    """Refuse a quant or packing that the format does not store, or a pair that does not go.

    A packing does not go with a quant that loses zeros, or that it cannot pack even where all are
    zero; a preset is judged by the quant of most of its tensors. A UsageError names what would do.
    """
    preset = quant_name in plugins.names("presets")
    _check_stored(format_name, "presets" if preset else "quant", quant_name)
    _check_stored(format_name, "packing", packing_name)

    most = plugins.load("presets", quant_name).QUANT if preset else quant_name
    if reason := _refuse_pair(packing_name, most):
        quants = list_stored(format_name, "quant")
        others = [name for name in quants if not _refuse_pair(packing_name, name)]
        raise UsageError(
            "packing-unfit-for-quant",
            f"packing {packing_name!r} does not go with quant {quant_name!r}: {reason}",
            remedy=f"use packing 'plain', or one of the quants {', '.join(others)}",
        )


def _check_stored(format_name: str, kind: str, name: str) -> None:
    if format_name not in _load(kind, name).FORMATS:
        raise UsageError(
            "not-stored-by-format",
            f"format {format_name!r} does not store {kind.removesuffix('s')} {name!r}",
            remedy=f"it stores {', '.join(list_stored(format_name, kind))}",
        )


def _refuse_pair(packing_name: str, quant_name: str) -> str:
    packing = load(packing_name)
    if packing.REQUIRES_ZEROS and not plugins.load("quant", quant_name).PRESERVES_ZERO:
        return "it leaves zeros out, and the quant does not keep them"
    return packing.fits(quant_name, 1.0)


def _load(kind: str, name: str) -> Any:
    # Each kind is written out: the address of a stage has the plugins of the kinds it can load.
    if kind == "presets":
        return plugins.load("presets", name)
    return plugins.load("quant", name) if kind == "quant" else load(name)


def list_stored(format_name: str, kind: str) -> list[str]:
    """Return the plugins of a kind that a file format stores and that this machine can import."""
    stored = []
    for name in plugins.names(kind):
        with suppress(MissingExtraError):  # not a way out on this machine
            if format_name in _load(kind, name).FORMATS:
                stored.append(name)
    return stored
