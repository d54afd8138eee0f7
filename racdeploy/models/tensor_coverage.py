"""Checks that a checkpoint has all tensors of its architecture in their shapes, and no others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import IGNORED_SUFFIX, Checkpoint
from racdeploy.models.families import find_expert, generalize_expert, star_numbers

_SHOWN = 8


def check_known_tensors(checkpoint: Checkpoint) -> None:
    """Refuse tensors that the architecture does not have, such as those of surplus experts."""
    family = checkpoint.family
    unknown = []

    for name in checkpoint.entries:
        index, inside = family.split_block(name)
        kind = generalize_expert(inside)
        tensors = family.model_tensors if index is None else family.block_tensors

        is_counted = (index or 0) < checkpoint.shape.block_count
        is_counted &= (find_expert(inside) or 0) < max(1, checkpoint.shape.num_experts)
        if (kind not in tensors or not is_counted) and not name.endswith(IGNORED_SUFFIX):
            unknown.append(name)

    if unknown:
        raise _refuse_unknown(checkpoint, unknown)


def check_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, Sequence[int]],
    optional: Set[str] = frozenset(),
) -> None:
    """Refuse a checkpoint with other tensors than expected, or in other shapes.

    Args:
        shapes: name → shape of each expected tensor, by the config.
        optional: names of tensors that may be missing.
    """
    used = checkpoint.used_entries
    if unknown := used.keys() - shapes.keys():
        raise _refuse_unknown(checkpoint, sorted(unknown))

    tied_head = {"lm_head.weight"} if checkpoint.tied else set()
    check_present(checkpoint, shapes.keys() - optional - tied_head)

    for name, expected in shapes.items():
        if name in used and used[name].shape != tuple(expected):
            raise ModelError(
                "wrong-tensor-shape",
                f"{checkpoint.folder}: {name!r} has shape {list(used[name].shape)}, its config.json"
                f" means {list(expected)}",
                remedy="the weights and the config belong to different models",
            )


def check_present(checkpoint: Checkpoint, needed: Set[str]) -> None:
    """Refuse a checkpoint that lacks tensors which the model computes with."""
    if missing := needed - checkpoint.used_entries.keys():
        raise ModelError(
            "missing-tensors",
            f"{checkpoint.folder} lacks {len(missing)} tensors: {shorten_names(sorted(missing))}",
            remedy="the checkpoint is incomplete; save or download it again",
        )


def _refuse_unknown(checkpoint: Checkpoint, unknown: Sequence[str]) -> ModelError:
    return ModelError(
        "unknown-tensors",
        f"{checkpoint.folder} holds {len(unknown)} tensors that"
        f" {checkpoint.family.architecture} does not have: {shorten_names(unknown)}",
        remedy="merge adapters into the model first, and save it without what the architecture"
        " does not use; fused or quantized tensors are not supported",
    )


def shorten_names(names: Iterable[str]) -> str:
    """Return a few names for a message; names that differ only in numbers become one with ``*``."""
    groups = defaultdict[str, list[str]](list)
    for name in names:
        groups[star_numbers(name)].append(name)

    shown = []
    for kind, alike in groups.items():
        shown.append(f"{kind} ({len(alike)})" if len(alike) > 1 else alike[0])

    if len(shown) > _SHOWN:
        shown[_SHOWN:] = [f"and {len(shown) - _SHOWN} more"]

    return ", ".join(shown)
