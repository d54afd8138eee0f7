"""Assemble pruned blocks and untouched tensors into one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.files.writing import atomic_folder
from racdeploy.models import fused_experts, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import find_expert, generalize_expert
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.quant.stored_codes import join_codes, write_model
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries, write_entries

_EXPERT_COUNTS = {"num_experts", "num_local_experts"}


@dataclass(frozen=True)
class CutShape:
    """Kept blocks of a model, and their sizes after the cut."""

    blocks: tuple[int, ...]  # their dense indices, ascending
    sizes: Sequence[Mapping[str, int]]  # of each kept block, by the letters of a family's shapes

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Settings of :data:`widths.SETTINGS`, each with one value per block."""
        values = {}
        for letter, setting in widths.SETTINGS.items():
            by_block = []
            for sizes in self.sizes:
                by_block.append(sizes[letter] // widths.width_per_unit(letter, sizes))
            values[setting] = tuple(by_block)
        return values

    @property
    def experts(self) -> int:
        """Number of experts in every block that has some; 0 if none has."""
        return max(size["E"] for size in self.sizes)


def assemble(
    checkpoint: Checkpoint, blocks: Path, out: Path, shape: CutShape | None = None
) -> Path:
    """Write the pruned model to ``out``, and the mean squared inputs if they were measured.

    Args:
        checkpoint: the dense model, whose other tensors are copied.
        blocks: folder with one file per pruned block, named by new indices.
        shape: kept blocks and their sizes; None if nothing was cut. Other blocks are left out, and
            the kept ones are renumbered from 0.
    """
    pruned = join_codes(read_block_entries(blocks))
    kept = _renumber(checkpoint, shape) if shape else checkpoint.all_entries

    entries = {name: pruned.get(name, entry) for name, entry in kept.items()}

    with atomic_folder(out) as scratch:
        _write_model(checkpoint, entries, shape, scratch)
        for kind in (IMPORTANCE_FILE, DENSE_IMPORTANCE_FILE):
            if beside := read_block_entries(blocks, kind.removesuffix(".safetensors")):
                write_entries(beside, scratch / kind)

    return out


def assemble_zero_filled(checkpoint: Checkpoint, out: Path, shape: CutShape) -> Path:
    """Write the folder of a cut model, with zeros in place of all values.

    Plans read sizes from it. Without codes, :func:`assemble` later writes the same names, types and
    shapes.
    """
    with atomic_folder(out) as scratch:
        _write_model(
            checkpoint, list_cut_entries(checkpoint, shape), shape, scratch, zero_filled=True
        )

    return out


def list_cut_entries(checkpoint: Checkpoint, shape: CutShape) -> dict[str, TensorEntry]:
    """Return the tensors of a cut model by their new names, without values."""
    family = checkpoint.family

    entries = {}
    for name, entry in _renumber(checkpoint, shape).items():
        block, inside = family.split_block(name)
        cut_shape = entry.shape
        if block is not None and generalize_expert(inside) in family.block_tensors:
            cut_shape = widths.tensor_shape(family, inside, shape.sizes[block])
        entries[name] = TensorEntry(entry.file, start=0, stop=0, dtype=entry.dtype, shape=cut_shape)

    return entries


def _write_model(
    checkpoint: Checkpoint,
    entries: Mapping[str, TensorEntry],
    shape: CutShape | None,
    folder: Path,
    *,
    zero_filled: bool = False,
) -> None:
    """Write the tensors, config, tokenizer, README and license."""
    family = checkpoint.family
    stored = fused_experts.fuse(entries, family.blocks, family.experts.fused)
    write_model(stored, folder, zero_filled=zero_filled)

    for name in ("config.json", "README.md", "LICENSE", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)

    is_cut = shape is not None and shape.sizes != checkpoint.shape.sizes
    if is_cut or checkpoint.is_multimodal or "quantization_config" in checkpoint.raw_config:
        _write_config(checkpoint, shape if is_cut else None, folder / "config.json")


def _renumber(checkpoint: Checkpoint, shape: CutShape) -> dict[str, TensorEntry]:
    """Return the entries of kept blocks and of the model itself, by their new names."""
    family = checkpoint.family
    new_indices = {block: new_index for new_index, block in enumerate(shape.blocks)}
    experts = shape.experts

    entries = {}
    for name, entry in checkpoint.all_entries.items():
        block, inside = family.split_block(name)
        if block is None:
            entries[name] = entry
        elif block in new_indices and (find_expert(inside) or 0) < (experts or 1):
            entries[f"{family.blocks}.{new_indices[block]}.{inside}"] = entry

    return entries


def _write_config(checkpoint: Checkpoint, shape: CutShape | None, file: Path) -> None:
    config = dict(checkpoint.raw_config)
    config.pop("quantization_config", None)  # the tensors are written unpacked
    if checkpoint.family.kind_prefixes:
        config = checkpoint.family.complete_config(config)

    dense = checkpoint.shape
    if shape:
        if len(shape.blocks) < dense.block_count:
            # A config may give these as a period: after blocks are removed only a list is right.
            kinds: dict[str, list[Any]] = {}
            if dense.family.window.period or dense.family.kind_prefixes:
                kinds["layer_types"] = list(dense.layer_types)
            if dense.family.rope.unrotated_period:
                kinds["no_rope_layers"] = list(map(int, dense.rotary_blocks))
            config |= kinds
            if dense.family.experts.dense_blocks:
                dense_blocks = ["dense" in dense.kinds[block] for block in shape.blocks]
                config[dense.family.experts.dense_blocks] = sum(dense_blocks)
        config = widths.cut_config(config, shape.blocks, shape.widths)
        if 0 < shape.experts < dense.num_experts:
            config[checkpoint.family.sizes["E"]] = shape.experts
            for key in _EXPERT_COUNTS & config.keys():  # transformers 5 may write another one
                config[key] = shape.experts

    if checkpoint.family.kind_prefixes:
        config |= checkpoint.family.config_form.write(config)
    # transformers derives a missing head_dim from the number of heads, which a cut changes.
    config["head_dim"] = dense.head_dim
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_block_entries(blocks: Path, kind: str = "block") -> dict[str, TensorEntry]:
    """Return the tensors of all files of blocks of a kind."""
    entries: dict[str, TensorEntry] = {}
    for file in sorted(blocks.glob(f"{kind}-*.safetensors")):
        entries |= read_tensor_entries(file)
    return entries
