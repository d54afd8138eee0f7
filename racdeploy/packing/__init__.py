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

    ``REQUIRES_ZEROS`` is True where zeros are left out. ``fits(quant, zeros_fraction)`` returns why a tensor
    is better stored plain, or an empty string. ``pack`` takes packed rows, ``packed_OP``, of the number
    format ``quant`` and returns the bytes to store; ``unpack`` gives the same rows back, bit for bit.
    """

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


def check(quant_name: str, packing_name: str) -> None:
    """Refuse a packing that leaves zeros out with a number format that loses them.

    Raises:
        UsageError: the two do not go together.
    """
    packing, quant = load(packing_name), plugins.load("quant", quant_name)
    if packing.REQUIRES_ZEROS and not quant.PRESERVES_ZERO:
        keeping = [name for name in plugins.names("quant") if name != quant_name and _keeps_zeros(name)]
        raise UsageError(
            f"packing {packing_name!r} leaves zeros out, but quant {quant_name!r} does not keep them",
            remedy=f"use packing 'plain', or one of the quants {', '.join(keeping)}",
        )


def _keeps_zeros(quant_name: str) -> bool:
    try:
        return bool(plugins.load("quant", quant_name).PRESERVES_ZERO)
    except MissingExtraError:  # not a way out on this machine
        return False
