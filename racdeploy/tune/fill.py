"""A mix of two number formats that uses the bytes there are: the most sensitive linears get more.

The order is that in which llama.cpp's presets spend bits (``llama_tensor_get_type``): values and
the down projection first, and the first and last blocks before those between.
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
from racdeploy.export.gguf.body import align
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.files.toml import merge
from racdeploy.quant import presets
from racdeploy.tune.candidates import Choice, list_quants, make_choice
from racdeploy.tune.sizes import Size

_BLOCK = re.compile(r"^blk\.(\d+)\.(\w+)\.")
_SENSITIVE = ("attn_v", "ffn_down", "attn_output", "attn_k", "attn_q")
_HEADER_BYTES = 512  # the file's description of itself may grow with the mix


def fill(tensors: Sequence[PlannedTensor], wider: str, spare_bytes: int) -> Mapping[str, str]:
    """Return patterns of tensor names → the wider format, for those that spare bytes allow."""
    spare_bytes -= _HEADER_BYTES
    blocks: dict[str, list[str]] = defaultdict(list)

    for tensor in _list_by_need(tensors):
        is_matrix = len(tensor.shape) > 1 and tensor.quant_real != "f32"
        if not is_matrix or quant.fits(quant.load(wider), tensor.shape[-1]):
            continue

        stored = replace(tensor, quant_real=wider)
        more = align(stored.size_bytes) - align(tensor.size_bytes)
        if 0 < more <= spare_bytes:
            spare_bytes -= more
            _, block, name = tensor.name.split(".", 2)
            blocks[name].append(block)

    patterns = {}
    for name, own in blocks.items():
        numbers = "|".join(own)
        patterns[rf"^blk\.({numbers})\.{re.escape(name)}$"] = wider
    return patterns


def _list_by_need(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """Return the tensors of blocks, those first that need bits most."""
    ranked: list[tuple[int, int, int, PlannedTensor]] = []
    last = max((int(match[1]) for match in map(_match, tensors) if match), default=0)

    for tensor in tensors:
        if match := _match(tensor):
            block = int(match[1])
            kind = match[2]
            if kind in _SENSITIVE:
                need = _SENSITIVE.index(kind)
            else:
                need = len(_SENSITIVE)
            ranked.append((need, min(block, last - block), len(ranked), tensor))

    return [tensor for *_, tensor in sorted(ranked)]


def _match(tensor: PlannedTensor) -> re.Match[str] | None:
    return _BLOCK.match(tensor.name)


def propose_mix(choice: Choice, size: Size, max_bytes: int) -> Choice | None:
    """Return a candidate with more bits for some tensors of a plain file; None if none fits."""
    recipe = choice.recipe
    if recipe.export.format != "gguf" or recipe.export.packing != "plain":
        return None

    bits = quant.load(presets.read(recipe.export.quant).quant).BITS
    stored = packings.list_stored("gguf", "quant")
    known = [name for name in list_quants(recipe) if name in stored]
    wider = [name for name in known if bits < quant.load(name).BITS]

    # Pruning chooses how wide each block is: only of equal widths is the size of a mix known.
    is_free = "ffn" in recipe.structure.parts and not recipe.structure.uniform
    fixed = list(size.tensors)
    if is_free:
        fixed = [each for each in fixed if ".ffn_" not in each.name]

    for name in sorted(wider, key=lambda each: quant.load(each).BITS):
        tensors = fill(fixed, name, max_bytes - size.size_bytes)
        if not tensors:
            continue

        settings = merge(choice.settings, {"export": {"tensors": tensors}})
        settings = merge(settings, {"prune": {"joint": recipe.prune.joint}})
        with suppress(UsageError):  # codes of this format cannot be chosen
            return make_choice(choice.job, f"{choice.name} + {name}", choice.kind, settings)

    return None
