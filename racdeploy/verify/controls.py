"""Which dense models to set beside a sparse artifact: plain quantization at about its size.

A lower-bit dense model is what somebody would ship who does not prune. Two sizes are asked for: that of the artifact
as it is, and that of the artifact without its zeros, which is what packing or sparse kernels make of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy import plugins, quant
from racdeploy.export import ExportResult
from racdeploy.recipe import Export, Verification

SAME_SIZE = "same-size"
_ABOUT = 1.02


def same_size_quants(
    settings: Export,
    dense: ExportResult,
    pruned: ExportResult,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
) -> list[str]:
    """Return, for each size, the widest quant that a dense model of about that size or less can have.

    Args:
        settings: of the export; its own quant is that of the dense arm, and no rival.
        dense: the dense artifact.
        pruned: the pruned one.
        shapes: of the prunable weights, by their name in the checkpoint.
        sparsity: zeros in the pruned file, over them.
    """
    weights = sum(rows * row for rows, row in shapes.values())
    dense_linears, linears = (
        sum(t.size_bytes for t in e.tensors if t.source in shapes) for e in (dense, pruned)
    )
    sizes: list[float] = [pruned.size_bytes]
    if settings.packing in ("plain", "bitmask_op"):  # a bit a weight says where the zeros were
        sizes.append(pruned.size_bytes - linears * sparsity + weights / 8)
    rest = dense.size_bytes - dense_linears
    bits = _bits(settings, {row for _, row in shapes.values()})
    found = []
    for size in sizes:
        fitting = [name for name in bits if rest + weights * bits[name] / 8 <= _ABOUT * size]
        if fitting:  # ggml's K formats are the better ones of equal width
            found.append(max(fitting, key=lambda name: (bits[name], name.endswith("_k"), name)))
    return list(dict.fromkeys(found))


def control_notes(settings: Verification, rivals: int) -> list[str]:
    """Return what a reader must know where no rival was found."""
    if rivals or SAME_SIZE not in settings.controls:
        return []
    return [
        "no dense model was set beside the artifact: every number format gives a file that is larger"
    ]


def _bits(settings: Export, row_lengths: set[int]) -> dict[str, float]:
    """Return the quants that the format stores and the rows divide into, with their bits a weight."""
    quants = {name: quant.load(name) for name in plugins.names("quant") if name != settings.quant}
    return {
        name: chosen.BITS
        for name, chosen in quants.items()
        if settings.format in chosen.FORMATS
        and not any(quant.fits(chosen, row) for row in row_lengths)
    }
