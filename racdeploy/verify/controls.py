"""Which plain dense quants of about its size to set beside a sparse artifact, as rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from racdeploy import packing as packings
from racdeploy import plugins, quant
from racdeploy.export import ExportedTensor, ExportResult
from racdeploy.models.families import generalize
from racdeploy.recipe import Export, Verification

SAME_SIZE = "same-size"
_ABOUT = 1.02  # a rival may be this much larger: sizes of formats are no continuum


def same_size_quants(
    settings: Export,
    dense: ExportResult,
    pruned: ExportResult,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
) -> list[str]:
    """Return the widest quants of which a dense model is about as large as the artifact at most.

    Its size without zeros counts too: packing makes it. The export's quant is the dense arm's.
    ``shapes`` are those of the dense model's prunable weights by name, ``sparsity`` the share of
    zeros in what is left of them.
    """
    weights = sum(map(math.prod, shapes.values()))
    sizes: list[float] = [pruned.size_bytes]
    packing = packings.load(settings.packing)
    if packing.BESIDE_PLAIN or not packing.REQUIRES_ZEROS:
        left = _list_linears(pruned, shapes)
        mask_bytes = sum(math.prod(tensor.shape) for tensor in left) / 8  # where the zeros were
        zero_bytes = _linear_bytes(pruned, shapes) * sparsity

        sizes.append(pruned.size_bytes - zero_bytes + mask_bytes)

    rest_bytes = dense.size_bytes - _linear_bytes(dense, shapes)
    bits = _bits_by_quant(settings, {row for _, row in shapes.values()})

    def preference(name: str) -> tuple[float, bool, str]:
        # ggml's K formats are the better ones of equal width.
        return bits[name], name.endswith("_k"), name

    found = []
    for size in sizes:
        most_bytes = _ABOUT * size
        fitting = [name for name in bits if rest_bytes + weights * bits[name] / 8 <= most_bytes]

        if fitting:
            found.append(max(fitting, key=preference))

    return list(dict.fromkeys(found))


def control_notes(settings: Verification, rivals: int) -> list[str]:
    """Return what a reader must know where no rival was found."""
    if rivals or SAME_SIZE not in settings.controls:
        return []
    return [
        "no dense model was set beside the artifact: "
        "every number format gives a file that is larger"
    ]


def _linear_bytes(exported: ExportResult, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(tensor.size_bytes for tensor in _list_linears(exported, shapes))


def _list_linears(exported: ExportResult, names: Iterable[str]) -> list[ExportedTensor]:
    sources = set(map(generalize, names))
    return [tensor for tensor in exported.tensors if tensor.source in sources]


def _bits_by_quant(settings: Export, row_lengths: set[int]) -> dict[str, float]:
    """Return the bits a weight of the quants that the format stores and the rows divide into."""
    bits = {}
    for name in plugins.names("quant"):
        chosen = quant.load(name)
        if name == settings.quant or settings.format not in chosen.FORMATS:
            continue
        if not any(quant.fits(chosen, row) for row in row_lengths):
            bits[name] = chosen.BITS

    return bits
