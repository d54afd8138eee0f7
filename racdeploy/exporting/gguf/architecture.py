"""Find the llama.cpp architecture of a model.

Most architectures read a width for each block and use only that of the first. A family names
another one that uses all of them.
Source: llama-model.cpp and ``src/models/`` of llama.cpp; tried with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.results.pruning import DeviationRow


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's architecture for a model.

    Args:
        family: the model's family, with the names and settings of the architecture.
        deviation: why it is not the family's usual one, or None if it is.
    """

    family: Family
    deviation: DeviationRow | None = None


def find_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of the file; a ModelError if there is none."""
    shape = checkpoint.shape
    family = shape.family
    _check_memory(checkpoint)
    reason = _reason_against_usual(shape)
    usual = _find_usual(shape)
    if not reason:
        return Architecture(usual)

    if shape.is_uniform and family.per_block_arch is None:
        raise ModelError(
            "unsupported-cut",
            f"{checkpoint.folder}: {reason}",
            remedy="prune the dense model with all its heads",
        )

    if obstacle := _reason_against_per_block(checkpoint):
        raise ModelError(
            "unsupported-cut",
            f"{checkpoint.folder}: {obstacle}",
            remedy="prune the dense model again with structure.uniform = true",
        )

    actual = family.with_per_block_arch()
    if actual == usual:
        return Architecture(actual)

    deviation = DeviationRow(
        subject="architecture",
        requested=usual.gguf_arch,
        actual=actual.gguf_arch,
        reason=f"{reason}; under the name {actual.gguf_arch}, its code computes this same model",
    )
    return Architecture(actual, deviation)


def _check_memory(checkpoint: Checkpoint) -> None:
    """Refuse a hybrid model without attention or without a state: llama.cpp aborts on it."""
    family = checkpoint.family
    shape = checkpoint.shape
    if not family.state or (family.state.attending_arch and all(shape.attends)):
        return

    for kind, roles in (("attention", shape.attends), ("a state", shape.recurs)):
        if not any(roles):
            raise ModelError(
                "unsupported-cut",
                f"{checkpoint.folder}: no block has {kind}; llama.cpp opens a {family.gguf_arch}"
                " only with both, attention and a state",
                remedy="prune the dense model again with more of its blocks",
            )


def unsupported_reason(checkpoint: Checkpoint, sizes: Collection[str], uniform: bool) -> str:
    """Return why llama.cpp cannot run a model that is cut like this, or an empty string.

    Args:
        checkpoint: the dense model.
        sizes: letters of the sizes that are cut: ``SIZE_LETTER`` of structure plugins.
        uniform: all blocks get the same widths.
    """
    shape = checkpoint.shape
    family = shape.family
    # llama.cpp recognizes the size of a model, and so its scale, by numbers that a cut changes.
    scales = family.supported_values.get("query_pre_attn_scalar")
    has_own_scale = scales and shape.setting("attention_scalar") != shape.head_dim
    if has_own_scale and not {"L", "Q"}.isdisjoint(sizes):
        return (
            f"llama.cpp knows by {shape.block_count} blocks and by the number of heads how"
            f" this {family.gguf_arch} scales attention"
        )

    if not uniform and not {"F", "Q"}.isdisjoint(sizes):
        return _reason_against_per_block(checkpoint)

    if "Q" in sizes and family.per_block_arch is None:
        return _reason_against_narrow(family)
    return ""


def _find_usual(shape: ModelShape) -> Family:
    family = shape.family
    if family.state and family.state.attending_arch and all(shape.attends):
        return replace(family, gguf_arch=family.state.attending_arch)
    return family


def _reason_against_usual(shape: ModelShape) -> str:
    family = shape.family
    if not shape.is_uniform:
        return f"llama.cpp takes one width for all blocks of {family.gguf_arch}"
    if shape.sizes[0]["Q"] != shape.hidden_size:
        return _reason_against_narrow(family)
    return ""


def _reason_against_per_block(checkpoint: Checkpoint) -> str:
    family = checkpoint.family
    usual = family.gguf_arch
    other = family.per_block_arch
    if other is None:
        return f"llama.cpp takes one width for all blocks of {usual}"

    prefix = f"llama.cpp computes {usual} with blocks of different widths as {other.gguf_arch}"
    if other.tied and not checkpoint.tied:
        return f"{prefix}, which has no output projection of its own, and this model has one"

    for name in sorted(checkpoint.used_entries):
        stored = family.block_tensors.get(family.split_block(name)[1], "")
        linear = stored.removesuffix(".bias")
        if linear != stored and linear not in other.biases:
            return f"{prefix}, which has no biases, and this model has {name}"

    return ""


def _reason_against_narrow(family: Family) -> str:
    """Return why no query head can be removed, or an empty string."""
    if not family.needs_square_queries:
        return ""
    return f"llama.cpp requires query heads that are together as wide as a {family.gguf_arch} model"
