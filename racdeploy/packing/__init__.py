"""Packings: how zeros are left out of a file, one file per packing.

A packing knows packed rows of a number format and nothing of files. One that leaves zeros out works only
with a format that keeps them; :func:`check` says so before any work starts.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.errors import MissingExtraError, UsageError

__all__ = ["Packing", "check", "load"]


class Packing(Protocol):
    """A packing, as a module.

    ``FORMATS`` are the file formats that store it. ``REQUIRES_ZEROS`` is True where zeros are left out.
    ``fits(quant, zeros_fraction)`` returns why a tensor is better stored plain, or an empty string. ``pack`` takes
    packed rows, ``packed_OP``, of the number format ``quant`` and returns the bytes to store; ``unpack`` gives the same
    rows back, bit for bit.
    """

    FORMATS: tuple[str, ...]
    REQUIRES_ZEROS: bool

    def fits(self, quant: Any, zeros_fraction: float) -> str: ...

    def pack(self, quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]: ...

    def unpack(self, quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]: ...


def load(name: str) -> Packing:
    """Import the packing of that name.

    Raises:
        UnknownPluginError: there is no such packing.
    """
    return cast(Packing, plugins.load("packing", name))


def check(format_name: str, quant_name: str, packing_name: str) -> None:
    """Refuse a number format or a packing that the file format cannot store, or two that do not go together.

    A packing does not go with a number format that loses zeros, or that it cannot pack even where all are zero. Of a
    preset that is asked of the number format that most of its tensors have.

    Raises:
        UsageError: naming what would do instead.
    """
    packing = load(packing_name)
    preset = quant_name in plugins.names("presets")
    for kind, name in (("presets" if preset else "quant", quant_name), ("packing", packing_name)):
        if format_name not in plugins.load(kind, name).FORMATS:
            offered = [other for other in plugins.names(kind) if _stores(format_name, kind, other)]
            raise UsageError(
                f"format {format_name!r} does not store {kind.removesuffix('s')} {name!r}",
                remedy=f"it stores {', '.join(offered)}",
            )
    most = plugins.load("presets", quant_name).QUANT if preset else quant_name
    if reason := _reason(packing, plugins.load("quant", most)):
        stored = [name for name in plugins.names("quant") if _stores(format_name, "quant", name)]
        others = [name for name in stored if not _reason(packing, plugins.load("quant", name))]
        raise UsageError(
            f"packing {packing_name!r} does not go with quant {quant_name!r}: {reason}",
            remedy=f"use packing 'plain', or one of the quants {', '.join(others)}",
        )


def _reason(packing: Packing, quant: Any) -> str:
    if packing.REQUIRES_ZEROS and not quant.PRESERVES_ZERO:
        return "it leaves zeros out, and the quant does not keep them"
    return packing.fits(quant, 1.0)


def _stores(format_name: str, kind: str, name: str) -> bool:
    try:
        return format_name in plugins.load(kind, name).FORMATS
    except MissingExtraError:  # not a way out on this machine
        return False
