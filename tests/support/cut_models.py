"""Models with fewer heads, channels and blocks, cut anywhere: what exporters and loaders must read.

The weights that stay are unchanged. ``pad_checkpoint`` fills the same cut up with zeros instead, so
that a model of the usual shape computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.walk.assemble import CutShape, assemble

# Per block: query heads and channels that stay. Groups of heads stay equally large in a block.
Cut = Sequence[tuple[int, int]]


def cut_checkpoint(folder: Path, out: Path, cut: Cut, blocks: Sequence[int] | None = None) -> Path:
    """Write the model of a folder with these widths; the first heads of each group stay."""
    checkpoint = Checkpoint(folder)
    chosen = tuple(blocks if blocks is not None else range(checkpoint.shape.block_count))
    pieces = out.with_name(f"{out.name}-pieces")
    pieces.mkdir(parents=True)

    for place, (block, (heads, channels)) in enumerate(zip(chosen, cut, strict=True)):
        kept = choose(checkpoint, block, heads, channels)
        tensors = {}
        for name in checkpoint.family.block_tensors:
            source = f"{checkpoint.family.blocks}.{block}.{name}"
            if source not in checkpoint.entries:
                continue
            value = checkpoint.read(source)
            sizes = checkpoint.shape.sizes[block]
            for axis, index in enumerate(
                widths.list_kept_indices(checkpoint.family, name, kept, sizes)
            ):
                value = value if index is None else np.take(value, index, axis)
            tensors[f"{checkpoint.family.blocks}.{place}.{name}"] = np.ascontiguousarray(value)
        save_file(tensors, pieces / f"block-{place:05d}.safetensors")

    sizes = []
    for block, (heads, channels) in zip(chosen, cut, strict=True):
        own = checkpoint.shape.sizes[block]
        sizes.append({**own, "H": heads, "Q": heads * own["K"], "F": channels})
    return assemble(checkpoint, pieces, out, CutShape(chosen, sizes))


def pad_checkpoint(folder: Path, out: Path, cut: Cut) -> Path:
    """Write the model of a folder with zeros where the cut takes inputs of o_proj and down_proj."""
    checkpoint = Checkpoint(folder)
    pieces = out.with_name(f"{out.name}-pieces")
    pieces.mkdir(parents=True)

    for block, (heads, channels) in enumerate(cut):
        kept = choose(checkpoint, block, heads, channels)
        tensors = {}
        for name in checkpoint.family.block_tensors:
            letters = widths.list_axes(checkpoint.family, name)
            source = f"{checkpoint.family.blocks}.{block}.{name}"
            if len(letters) < 2 or letters[1] not in kept or source not in checkpoint.entries:
                continue
            value = checkpoint.read(source)
            gone = np.setdiff1d(np.arange(value.shape[1]), kept[letters[1]])
            value[:, gone] = 0
            tensors[source] = value
        save_file(tensors, pieces / f"block-{block:05d}.safetensors")

    return assemble(checkpoint, pieces, out)


def choose(
    checkpoint: Checkpoint, block: int, heads: int, channels: int
) -> Mapping[str, np.ndarray]:
    """Return what stays: the first heads of each group, and channels spread over all."""
    K, groups = checkpoint.shape.head_dim, checkpoint.shape.num_key_value_heads
    sizes = checkpoint.shape.sizes[block]
    own = np.arange(sizes["Q"]).reshape(groups, -1, K)
    spread = np.linspace(0, sizes["F"] - 1, channels).round().astype(np.int64)
    return {"Q": own[:, : heads // groups].reshape(-1), "F": spread}
