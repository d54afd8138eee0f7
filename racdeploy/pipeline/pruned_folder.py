"""A pruned model's folder that a user names: whether it came from the dense model, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from racdeploy.errors import UsageError
from racdeploy.files.reading import read_json
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune import PrunedModel

_OUTLINE = "structure.json"
"""Where pruning leaves which blocks stay, beside the folder of the model."""


def read_pruned(dense: Checkpoint, folder: Path) -> PrunedModel:
    """Return the pruned model of a folder, as the prune stage would.

    Raises:
        ModelError: the folder holds no model that can be read.
        UsageError: it was not made from the dense model, or nothing was pruned.
    """
    sparse = Checkpoint(folder)
    _check_family(dense, sparse)
    _check_vocabulary(dense, sparse)

    zeros = weights = 0
    for name in sparse.shape.linear_weights:
        values = sparse.read_raw(name)
        zeros += int(values.size - np.count_nonzero(values))
        weights += values.size

    shapes = {name: entry.shape for name, entry in dense.entries.items()}
    left = {name: entry.shape for name, entry in sparse.entries.items()}
    if not zeros and left == shapes:
        raise UsageError(
            "nothing-to-recover",
            f"{folder} has no zeros, and nothing was cut from it: there is nothing to recover",
            remedy="prune first: racdeploy prune MODEL --sparsity 0.5",
        )

    return PrunedModel(folder, zeros / weights, (), (), {}, sources=_find_sources(dense, sparse))


def _check_family(dense: Checkpoint, sparse: Checkpoint) -> None:
    """Refuse a model of another architecture or width."""
    for key in ("model_type", "hidden_size"):
        theirs, own = dense.config.get(key), sparse.config.get(key)
        if theirs != own:
            raise _refuse_other(
                f"{sparse.folder} has {key} {own!r} and {dense.folder} has {theirs!r}"
            )

    own, whole = sparse.shape, dense.shape
    if own.head_dim != whole.head_dim or own.block_count > whole.block_count:
        raise _refuse_other(
            f"{sparse.folder} has {own.block_count} blocks of heads {own.head_dim} wide, "
            f"{dense.folder} has {whole.block_count} of {whole.head_dim}"
        )


def _check_vocabulary(dense: Checkpoint, sparse: Checkpoint) -> None:
    """Refuse other tokens: both models must say the same words, and embed them alike."""
    theirs, own = dense.shape.vocab_size, sparse.shape.vocab_size
    if theirs != own:
        raise UsageError(
            "vocabulary-was-cut",
            f"{sparse.folder} has {own} tokens and {dense.folder} has {theirs}: "
            "the dense model cannot grade what it cannot say",
            remedy="recover before the vocabulary is cut: racdeploy build does both in order",
        )

    # Pruning leaves the embedding alone, byte for byte.
    rows = np.linspace(0, own - 1, num=min(own, 64), dtype=np.int64)
    theirs_ND = dense.read_rows(dense.family.embedding, rows)
    own_ND = sparse.read_rows(sparse.family.embedding, rows)
    if not np.array_equal(theirs_ND, own_ND):
        raise _refuse_other(f"{sparse.folder} embeds tokens otherwise than {dense.folder}")


def _refuse_other(difference: str) -> UsageError:
    return UsageError(
        "other-dense-model",
        f"{difference}: it was pruned from another model",
        remedy="name the dense model that it was pruned from",
    )


def _find_sources(dense: Checkpoint, sparse: Checkpoint) -> Sequence[int]:
    """Return from which dense block each block was cut."""
    left, blocks = sparse.shape.block_count, dense.shape.block_count
    if left == blocks:
        return range(blocks)

    outline = sparse.folder.parent / _OUTLINE
    if not outline.is_file():
        raise UsageError(
            "blocks-not-recorded",
            f"{sparse.folder} has {left} of {blocks} blocks, and {outline} does not say which",
            remedy="name the folder that racdeploy prune left in its work folder",
        )

    return tuple(int(block) for block in read_json(outline)["blocks"])
