"""Reading of a pruned model's folder, and checks that it was made from the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from racdeploy.errors import UsageError
from racdeploy.files.reading import read_json
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning import CUT_PLAN_FILE, PrunedModel


def read_pruned(dense: Checkpoint, folder: Path) -> PrunedModel:
    """Return the pruned model of a folder, as the prune stage would.

    Raises:
        ModelError: the folder holds no model that can be read.
        UsageError: it was not made from the dense model, or nothing was pruned.
    """
    sparse = Checkpoint(folder)
    _check_family(dense, sparse)
    _check_vocabulary(dense, sparse)

    # Zeros are counted, since the folder does not record how it was made.
    zeros = weights = 0
    for name in sparse.shape.prunable_weights:
        values = sparse.read_raw(name)
        zeros += int(values.size - np.count_nonzero(values))
        weights += values.size

    shapes = {name: entry.shape for name, entry in dense.entries.items()}
    pruned_shapes = {name: entry.shape for name, entry in sparse.entries.items()}
    if not zeros and pruned_shapes == shapes:
        raise UsageError(
            "nothing-to-recover",
            f"{folder} has no zeros, and nothing was cut from it: there is nothing to recover",
            remedy="prune first: racdeploy prune MODEL --sparsity 0.5",
        )

    return PrunedModel(folder, sparsity=zeros / weights, source_blocks=_find_sources(dense, sparse))


def _check_family(dense: Checkpoint, sparse: Checkpoint) -> None:
    """Refuse a model of another architecture or width."""
    for key in ("model_type", "hidden_size"):
        dense_value, sparse_value = dense.config.get(key), sparse.config.get(key)
        if dense_value != sparse_value:
            raise _refuse_other(
                f"{sparse.folder} has {key} {sparse_value!r} and {dense.folder} has {dense_value!r}"
            )

    after, before = sparse.shape, dense.shape
    if after.head_dim != before.head_dim or after.block_count > before.block_count:
        raise _refuse_other(
            f"{sparse.folder} has {after.block_count} blocks of heads {after.head_dim} wide, "
            f"{dense.folder} has {before.block_count} of {before.head_dim}"
        )


def _check_vocabulary(dense: Checkpoint, sparse: Checkpoint) -> None:
    """Refuse another vocabulary or other embeddings: both models must have the same tokens."""
    dense_tokens, sparse_tokens = dense.shape.vocab_size, sparse.shape.vocab_size
    if dense_tokens != sparse_tokens:
        raise UsageError(
            "vocabulary-was-cut",
            f"{sparse.folder} has {sparse_tokens} tokens and {dense.folder} has {dense_tokens}: "
            "the dense model has no probabilities for other tokens",
            remedy="recover before the vocabulary is cut: racdeploy build does both in order",
        )

    # Pruning leaves the embedding alone, byte for byte.
    rows = np.linspace(0, sparse_tokens - 1, num=min(sparse_tokens, 64), dtype=np.int64)
    dense_ND = dense.read_rows(dense.family.embedding, rows)
    sparse_ND = sparse.read_rows(sparse.family.embedding, rows)
    if not np.array_equal(dense_ND, sparse_ND):
        raise _refuse_other(f"{sparse.folder} has other token embeddings than {dense.folder}")


def _refuse_other(difference: str) -> UsageError:
    return UsageError(
        "other-dense-model",
        f"{difference}: it was pruned from another model",
        remedy="name the dense model that it was pruned from",
    )


def _find_sources(dense: Checkpoint, sparse: Checkpoint) -> Sequence[int]:
    """Return the number of the dense block that each block came from."""
    kept, blocks = sparse.shape.block_count, dense.shape.block_count
    if kept == blocks:
        return range(blocks)

    outline = sparse.folder.parent / CUT_PLAN_FILE
    if not outline.is_file():
        raise UsageError(
            "blocks-not-recorded",
            f"{sparse.folder} has {kept} of {blocks} blocks; {outline}, their list, is missing",
            remedy="name the folder that racdeploy prune left in its work folder",
        )

    return tuple(int(block) for block in read_json(outline)["blocks"])
