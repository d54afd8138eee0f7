"""Put pruned blocks and untouched tensors together into one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.files.writing import atomic_folder
from racdeploy.models import fused, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of, generalize
from racdeploy.models.shape import ModelShape
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries, write_entries

_EXPERT_COUNTS = {"num_experts", "num_local_experts"}


@dataclass(frozen=True)
class CutShape:
    """Which blocks of a model stay, and how wide they are."""

    blocks: tuple[int, ...]  # their numbers in the dense model, rising
    sizes: Sequence[Mapping[str, int]]  # of each of them, by the letters of a family's shapes

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Settings of :data:`widths.SETTINGS`, each with a value for every block."""
        found = {}
        for letter, setting in widths.SETTINGS.items():
            found[setting] = tuple(own[letter] // widths.unit(letter, own) for own in self.sizes)
        return found

    @property
    def experts(self) -> int:
        """Number of experts of every block; 0 where the family knows none."""
        return self.sizes[0].get("E", 0)

    def removes(self, inside: str) -> bool:
        """Return whether a name inside a block is that of an expert beyond those that stay."""
        return bool(self.experts) and (expert_of(inside) or 0) >= self.experts


def assemble(
    checkpoint: Checkpoint, blocks: Path, out: Path, shape: CutShape | None = None
) -> Path:
    """Write ``out``: the checkpoint with pruned weights, and the mean squared inputs, if any.

    With a ``shape``, blocks that it does not name are left out and the others numbered anew; files
    in ``blocks`` use the new numbers.
    """
    pruned = _read_entries(blocks, "block")
    kept = _renumber(checkpoint, shape) if shape else checkpoint.whole

    entries = {name: pruned.get(name, entry) for name, entry in kept.items()}
    family = checkpoint.family

    with atomic_folder(out) as scratch:
        stored = fused.join(entries, family.blocks, family.fused)
        write_entries(stored, scratch / "model.safetensors")
        for kind in (IMPORTANCE_FILE, DENSE_IMPORTANCE_FILE):
            if importance := _read_entries(blocks, kind.removesuffix(".safetensors")):
                write_entries(importance, scratch / kind)

        _write_about(checkpoint, shape, scratch)

    return out


def sketch(checkpoint: Checkpoint, out: Path, shape: CutShape) -> Path:
    """Write the folder of a cut model before it is cut: every tensor has its shape and no values.

    What :func:`assemble` will write differs from it in the values alone.
    """
    family = checkpoint.family

    entries = {}
    for name, entry in _renumber(checkpoint, shape).items():
        block, inside = family.split_block(name)
        left = entry.shape
        if block is not None and generalize(inside) in family.block_tensors:
            left = widths.shape(family, inside, shape.sizes[block])
        entries[name] = TensorEntry(entry.file, 0, 0, entry.dtype, left)

    with atomic_folder(out) as scratch:
        stored = fused.join(entries, family.blocks, family.fused)
        write_entries(stored, scratch / "model.safetensors", hollow=True)
        _write_about(checkpoint, shape, scratch)

    return out


def _write_about(checkpoint: Checkpoint, shape: CutShape | None, folder: Path) -> None:
    """Write all files of a cut model that hold no weights."""
    for name in ("config.json", "README.md", "LICENSE", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)

    is_cut = shape is not None and shape.sizes != checkpoint.shape.sizes
    if is_cut or checkpoint.is_part or checkpoint.is_packed:
        _write_config(checkpoint, shape if is_cut else None, folder / "config.json")


def _renumber(checkpoint: Checkpoint, shape: CutShape) -> dict[str, TensorEntry]:
    """Return the entries that stay, by their new names."""
    family = checkpoint.family
    numbers = {block: place for place, block in enumerate(shape.blocks)}

    entries = {}

    for name, entry in checkpoint.whole.items():
        block, inside = family.split_block(name)
        if block is None:
            entries[name] = entry
        elif block in numbers and not shape.removes(inside):
            entries[f"{family.blocks}.{numbers[block]}.{inside}"] = entry

    return entries


def _write_config(checkpoint: Checkpoint, shape: CutShape | None, file: Path) -> None:
    config = dict(checkpoint.written)
    if checkpoint.is_packed:  # what is written is not
        config.pop("quantization_config", None)
    if checkpoint.family.only:
        config = checkpoint.family.complete(config)

    dense = checkpoint.shape
    if shape:
        if len(shape.blocks) < dense.block_count:
            config |= _list_block_kinds(dense)
        config = widths.write(config, shape.blocks, shape.widths)
        if shape.experts != dense.num_experts:
            config[checkpoint.family.sizes["E"]] = shape.experts
            for key in _EXPERT_COUNTS & config.keys():  # transformers 5 may write another one
                config[key] = shape.experts

    if checkpoint.family.only:
        config |= checkpoint.family.write(config)
    # Heads that are fewer no longer say how wide one is.
    config["head_dim"] = dense.head_dim
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _list_block_kinds(shape: ModelShape) -> dict[str, list[Any]]:
    """Return what a config may say by counting blocks, as lists that blocks can be left out of."""
    kinds: dict[str, list[Any]] = {}
    if shape.family.window_period or shape.family.only:
        kinds["layer_types"] = list(shape.layer_types)
    if shape.family.no_rope_period:
        kinds["no_rope_layers"] = list(map(int, shape.rotary_blocks))
    return kinds


def _read_entries(blocks: Path, kind: str) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(blocks.glob(f"{kind}-*.safetensors")):
        entries |= read_tensor_entries(file)
    return entries
