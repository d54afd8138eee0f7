"""Choice of rivals: plain dense quants of about the size of a sparse artifact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from racdeploy import packing as packings
from racdeploy import plugins, quant
from racdeploy.exporting import ExportedTensor, ExportResult
from racdeploy.models.families import generalize_expert
from racdeploy.recipe import Export, Verification

SAME_SIZE = "same-size"
_MAX_SIZE_RATIO = 1.02  # rival to artifact; no format hits a size exactly


def find_same_size_quants(
    settings: Export,
    reference: str,
    dense: ExportResult,
    pruned: ExportResult,
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float,
) -> list[str]:
    """Return the widest quants whose dense model is at most about as large as the artifact.

    A plain artifact has a second size, the one that packing would give it, and so a second rival.

    Args:
        reference: number format of the dense arm, which is left out.
        shapes: shapes of the dense model's prunable weights by name.
        sparsity: share of zeros in the prunable weights that were kept.
    """
    weights = sum(map(math.prod, shapes.values()))
    sizes: list[float] = [pruned.size_bytes]
    packing = packings.load(settings.packing)
    if packing.KEEPS_PLAIN_FILE or not packing.REQUIRES_ZEROS:
        linears = _list_linears(pruned, shapes)
        mask_bytes = sum(math.prod(tensor.shape) for tensor in linears) / 8  # where the zeros were
        zero_bytes = _linear_bytes(pruned, shapes) * sparsity

        sizes.append(pruned.size_bytes - zero_bytes + mask_bytes)

    rest_bytes = dense.size_bytes - _linear_bytes(dense, shapes)
    row_lengths = {row for _, row in shapes.values()}
    bits = {}
    for name in plugins.list_names("quant"):
        rival = quant.load(name)
        fits = not any(quant.explain_misfit(rival, row) for row in row_lengths)
        if fits and settings.format in rival.formats and name != reference:
            bits[name] = rival.bits

    def preference(name: str) -> tuple[float, bool, str]:
        # ggml's K formats are the better ones of equal width.
        return bits[name], name.endswith("_k"), name

    chosen = []
    for size in sizes:
        max_bytes = _MAX_SIZE_RATIO * size
        fitting = [name for name in bits if rest_bytes + weights * bits[name] / 8 <= max_bytes]

        if fitting:
            chosen.append(max(fitting, key=preference))

    return list(dict.fromkeys(chosen))


def note_missing_rivals(settings: Verification, rivals: int) -> list[str]:
    """Return a note for the report if rivals were asked for and none was found."""
    if rivals or SAME_SIZE not in settings.controls:
        return []
    return [
        "the artifact was compared with no other dense model: "
        "every number format gives a larger file"
    ]


def _linear_bytes(exported: ExportResult, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(tensor.size_bytes for tensor in _list_linears(exported, shapes))


def _list_linears(exported: ExportResult, names: Iterable[str]) -> list[ExportedTensor]:
    sources = set(map(generalize_expert, names))
    return [tensor for tensor in exported.tensors if tensor.source in sources]
