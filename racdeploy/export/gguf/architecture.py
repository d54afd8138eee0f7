"""Which of llama.cpp's architectures a model is written as.

Most read a width for each block and use that of the first. A family names one that uses them all.
Source: llama-model.cpp and ``src/models/`` of llama.cpp, and what llama-cpp-python 0.3.36 opens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from racdeploy.errors import ModelError
from racdeploy.export import Deviation
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import list_used_tensors
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape


def find_architecture(checkpoint: Checkpoint) -> Family:
    """Return the family as the file will have it; a ModelError where llama.cpp has none."""
    shape = checkpoint.shape
    family = shape.family
    _check_memory(checkpoint)
    why_not = _refuse_usual(shape)
    if not why_not:
        return _find_usual(shape)

    if shape.is_uniform and family.per_block is None:
        raise ModelError(
            "unsupported-cut",
            f"{checkpoint.folder}: {why_not}",
            remedy="prune the dense model with all its heads",
        )

    if why := _refuse_per_block(checkpoint):
        raise ModelError(
            "unsupported-cut",
            f"{checkpoint.folder}: {why}",
            remedy="prune the dense model again with structure.uniform = true",
        )

    return family.as_per_block()


def _check_memory(checkpoint: Checkpoint) -> None:
    """Refuse a model for which llama.cpp would keep no keys, or no states: it ends there."""
    family = checkpoint.family
    shape = checkpoint.shape
    is_other = bool(family.attending_arch) and all(shape.attends)
    if not family.has_state or is_other:
        return

    for what, roles in (("attention", shape.attends), ("a state", shape.recurs)):
        if not any(roles):
            raise ModelError(
                "unsupported-cut",
                f"{checkpoint.folder}: no block has {what}; llama.cpp opens a {family.gguf_arch}"
                " only with both, attention and a state",
                remedy="prune the dense model again with more of its blocks",
            )


def refusal(checkpoint: Checkpoint, sizes: Collection[str], uniform: bool) -> str:
    """Return why llama.cpp could not run a dense model once parts of it are cut, or nothing.

    Args:
        sizes: letters of what is cut, as plugins of the kind ``structures`` say them.
        uniform: whether all blocks get the same widths.
    """
    shape = checkpoint.shape
    family = shape.family
    if "L" in sizes and family.no_rope_period:
        return (
            f"llama.cpp leaves rotary embeddings out of every block {family.no_rope_period} of"
            f" {family.gguf_arch}, wherever the blocks were before"
        )

    counts = any("=attention_scalar" in values for values in family.fixed.values())
    scaled = counts and shape.setting("attention_scalar") != shape.head_dim
    if scaled and not {"L", "Q"}.isdisjoint(sizes):
        return (
            f"llama.cpp knows by {shape.block_count} blocks and by the number of heads how"
            f" this {family.gguf_arch} scales attention"
        )

    if not uniform and not {"F", "Q"}.isdisjoint(sizes):
        return _refuse_per_block(checkpoint)

    if "Q" in sizes and family.per_block is None:
        return _refuse_narrow(family)
    return ""


def list_deviations(checkpoint: Checkpoint) -> tuple[Deviation, ...]:
    """Return that the file is not of the family's usual architecture, if so, and why."""
    usual, chosen = _find_usual(checkpoint.shape), find_architecture(checkpoint)
    if chosen == usual:
        return ()

    reason = f"{_refuse_usual(checkpoint.shape)}; {chosen.gguf_arch} computes the same"
    return (Deviation("architecture", usual.gguf_arch, chosen.gguf_arch, reason),)


def _find_usual(shape: ModelShape) -> Family:
    family = shape.family
    if family.attending_arch and all(shape.attends):
        return replace(family, gguf_arch=family.attending_arch)
    return family


def _refuse_usual(shape: ModelShape) -> str:
    family = shape.family
    if not shape.is_uniform:
        return f"llama.cpp takes one width for all blocks of {family.gguf_arch}"
    if shape.sizes[0]["Q"] != shape.hidden_size:
        return _refuse_narrow(family)
    return ""


def _refuse_per_block(checkpoint: Checkpoint) -> str:
    family = checkpoint.family
    usual = family.gguf_arch
    other = family.per_block
    if other is None:
        return f"llama.cpp takes one width for all blocks of {usual}"

    alike = f"llama.cpp computes {usual} with blocks of different widths as {other.gguf_arch}"
    if other.tied and not checkpoint.tied:
        return f"{alike}, which has no output projection of its own, and this model has one"

    for name in sorted(list_used_tensors(checkpoint)):
        stored = family.block_tensors.get(family.split_block(name)[1], "")
        linear = stored.removesuffix(".bias")
        if linear != stored and linear not in other.biases:
            return f"{alike}, which has no biases, and this model has {name}"

    return ""


def _refuse_narrow(family: Family) -> str:
    """Return why no query head can be missing, if so."""
    if not family.square_queries:
        return ""
    return f"llama.cpp wants query heads that are together as wide as a {family.gguf_arch} model"
