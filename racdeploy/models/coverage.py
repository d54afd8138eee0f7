"""Which tensors of a model are pruned, stay dense by name, or are nobody's: none may slip past."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set

from racdeploy.errors import ModelError, UsageError
from racdeploy.models.checkpoint import Checkpoint

IGNORED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold and nobody reads."""
_SHOWN = 8


def check_covered(checkpoint: Checkpoint, dense: Sequence[str]) -> None:
    """Refuse unknown tensors, and matrices that stay dense without a regular expression for it."""
    family = checkpoint.family
    unknown, uncovered = list[str](), list[str]()

    for name in checkpoint.entries:
        index, inside = family.split_block(name)

        kind = _star(inside)
        tensors = family.model_tensors if index is None else family.block_tensors
        is_known = kind in tensors and (index or 0) < checkpoint.block_count
        if not is_known and not name.endswith(IGNORED):
            unknown.append(name)
            continue

        linear = name.removesuffix(".weight")
        stays_dense = any(re.search(pattern, linear) for pattern in dense)
        if kind.removesuffix(".weight") in family.routed and not stays_dense:
            uncovered.append(linear)

    if unknown:
        raise _refuse_unknown(checkpoint, unknown)

    if uncovered:
        kinds = [_star(family.split_block(name)[1]) for name in uncovered]

        patterns = [*dense, *sorted({kind.partition(".*")[0] for kind in kinds})]
        raise UsageError(
            f"{len(uncovered)} matrices of {family.architecture} cannot be pruned:"
            f" {list_names(uncovered)}",
            remedy=f"say under [prune] that they stay as they are: dense = {json.dumps(patterns)}",
        )


def list_used_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the tensors that the model computes with: no leftovers, no second embedding."""
    unused = {"lm_head.weight"} if checkpoint.tied else set()
    return frozenset(name for name in checkpoint.entries if not name.endswith(IGNORED)) - unused


def check_tensors(
    checkpoint: Checkpoint, expected: Set[str], optional: Set[str] = frozenset()
) -> None:
    """Refuse a checkpoint whose tensors are not the expected ones; optional ones may be missing."""
    found = list_used_tensors(checkpoint)
    if unknown := found - expected:
        raise _refuse_unknown(checkpoint, sorted(unknown))

    needed = expected - optional - ({"lm_head.weight"} if checkpoint.tied else set())
    if missing := needed - found:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(missing)} tensors: {list_names(sorted(missing))}",
            remedy="the checkpoint is incomplete; save or download it again",
        )


def _refuse_unknown(checkpoint: Checkpoint, unknown: Sequence[str]) -> ModelError:
    return ModelError(
        f"{checkpoint.folder} holds {len(unknown)} tensors that"
        f" {checkpoint.family.architecture} does not have: {list_names(unknown)}",
        remedy="merge adapters into the model first, and save it without what the architecture"
        " does not use; fused or quantized tensors are not supported",
    )


def _star(name: str) -> str:
    """Return a tensor's name with ``*`` for every number between dots."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def list_names(names: Iterable[str]) -> str:
    """Return a few names for a message; those that differ in numbers alone are one, with ``*``."""
    alike = defaultdict[str, list[str]](list)
    for name in names:
        alike[_star(name)].append(name)

    shown = []
    for kind, (first, *others) in alike.items():
        shown.append(f"{kind} ({1 + len(others)})" if others else first)

    if len(shown) > _SHOWN:
        shown[_SHOWN:] = [f"and {len(shown) - _SHOWN} more"]

    return ", ".join(shown)
