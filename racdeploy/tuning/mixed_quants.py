"""Mix two number formats to use up the byte limit: the most sensitive linears get more bits.

The order is that of llama.cpp's presets (``llama_tensor_get_type``): value and down projections
first, and the first and last blocks before those between.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from racdeploy import packing as packings
from racdeploy import quant
from racdeploy.errors import UsageError
from racdeploy.exporting.gguf.tensor_writer import align_offset
from racdeploy.exporting.gguf.tensors import GgufTensorPlan
from racdeploy.pipeline.artifact_sizes import ArtifactSize
from racdeploy.recipe_settings import merge_settings
from racdeploy.tuning.candidates import CandidateSpec, count_bits, list_quants, make_spec

_BLOCK = re.compile(r"^blk\.(\d+)\.(\w+)\.")
_SENSITIVE = ("attn_v", "ffn_down", "attn_output", "attn_k", "attn_q")
_HEADER_BYTES = 512  # reserve: the metadata grows with the patterns


def widen_tensors(
    tensors: Sequence[GgufTensorPlan], wider: str, spare_bytes: int
) -> Mapping[str, str]:
    """Give tensors a wider format, the most sensitive first, as long as spare bytes last.

    Args:
        wider: that format.

    Returns:
        Patterns of tensor names → the format, as in ``export.tensors``.
    """
    spare_bytes -= _HEADER_BYTES
    blocks: dict[str, list[str]] = defaultdict(list)

    for tensor in _list_by_need(tensors):
        is_matrix = len(tensor.shape) > 1 and tensor.actual_quant != "f32"
        if not is_matrix or quant.explain_misfit(quant.load(wider), tensor.shape[-1]):
            continue

        stored = replace(tensor, actual_quant=wider)
        extra_bytes = align_offset(stored.size_bytes) - align_offset(tensor.size_bytes)
        if 0 < extra_bytes <= spare_bytes:
            spare_bytes -= extra_bytes
            _, block, name = tensor.name.split(".", 2)
            blocks[name].append(block)

    patterns = {}
    for name, block_numbers in blocks.items():
        numbers = "|".join(block_numbers)
        patterns[rf"^blk\.({numbers})\.{re.escape(name)}$"] = wider
    return patterns


def _list_by_need(tensors: Sequence[GgufTensorPlan]) -> list[GgufTensorPlan]:
    """Return the tensors of blocks, the most sensitive ones first."""
    matches = [(_BLOCK.match(tensor.name), tensor) for tensor in tensors]
    rows = [(int(match[1]), match[2], tensor) for match, tensor in matches if match]
    last = max((block for block, _, _ in rows), default=0)

    def measure_need(row: tuple[int, str, GgufTensorPlan]) -> tuple[int, int]:
        block, kind, _ = row
        return [*_SENSITIVE, kind].index(kind), min(block, last - block)

    return [tensor for _, _, tensor in sorted(rows, key=measure_need)]


def propose_mixed_quant(
    spec: CandidateSpec, size: ArtifactSize, max_bytes: int
) -> CandidateSpec | None:
    """Return a variant of a plain GGUF candidate with a wider format for some tensors.

    None if no tensor fits into the limit.
    """
    recipe = spec.recipe
    if recipe.export.format != "gguf" or recipe.export.packing != "plain":
        return None

    own_bits = count_bits(recipe.export.quant)
    stored = packings.list_supported("gguf", "quant")
    bits = {name: quant.load(name).bits for name in list_quants(recipe) if name in stored}
    wider = [name for name in bits if own_bits < bits[name]]

    # Pruning may give blocks different widths, known only later: then these tensors stay as they
    # are, or the size of the mix could not be predicted.
    is_free = "ffn" in recipe.structure.cut_parts and not recipe.structure.uniform
    fixed = list(size.tensors)
    if is_free:
        fixed = [each for each in fixed if ".ffn_" not in each.name]

    for name in sorted(wider, key=bits.__getitem__):
        tensors = widen_tensors(fixed, name, max_bytes - size.size_bytes)
        if not tensors:
            continue

        settings = merge_settings(spec.settings, {"export": {"tensors": tensors}})
        with suppress(UsageError):  # codes of this format cannot be chosen
            return make_spec(spec.job, f"{spec.name} + {name}", spec.kind, settings)

    return None
