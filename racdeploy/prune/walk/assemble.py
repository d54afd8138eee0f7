"""Put pruned blocks and untouched tensors together into one Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.files.writing import atomic_folder
from racdeploy.models import fused, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import expert_of, generalize
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.models.widths import SETTINGS
from racdeploy.quant import DENSE_IMPORTANCE_FILE, IMPORTANCE_FILE
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries, write_entries

_EXPERT_COUNTS = {"num_experts", "num_local_experts"}


@dataclass(frozen=True)
class Shape:
    """Which blocks of a model stay, and how wide they are."""

    blocks: tuple[int, ...]  # their numbers in the dense model, rising
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # setting → of each of them
    experts: int = 0  # of every block; 0 where the family knows none

    def sizes(self, checkpoint: Checkpoint, place: int) -> dict[str, int]:
        """Return what the letters of a family's shapes stand for in one of the blocks."""
        sizes = dict(checkpoint.sizes(self.blocks[place]))
        for letter, setting in SETTINGS.items():
            unit = checkpoint.unit(letter, self.blocks[place])
            sizes[letter] = self.widths[setting][place] * unit
        sizes["H"] = self.widths["num_attention_heads"][place]
        if self.experts:
            sizes["E"] = self.experts
        return sizes

    def removes(self, inside: str) -> bool:
        """Return whether a name inside a block is that of an expert beyond those that stay."""
        return bool(self.experts) and (expert_of(inside) or 0) >= self.experts

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shape:
        """Return the shape that a model has, with every setting of :data:`widths.SETTINGS`."""
        known = {setting: checkpoint.per_block(setting) for setting in SETTINGS.values()}
        return cls(tuple(range(checkpoint.block_count)), known, checkpoint.experts)


def assemble(checkpoint: Checkpoint, blocks: Path, out: Path, shape: Shape | None = None) -> Path:
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


def sketch(checkpoint: Checkpoint, out: Path, shape: Shape) -> Path:
    """Write the folder of a cut model before it is cut: every tensor has its shape and no values.

    What :func:`assemble` will write differs from it in the values alone.
    """
    family = checkpoint.family
    lengths = [shape.sizes(checkpoint, place) for place in range(len(shape.blocks))]

    entries = {}
    for name, entry in _renumber(checkpoint, shape).items():
        block, inside = family.split_block(name)
        left = entry.shape
        if block is not None and generalize(inside) in family.block_tensors:
            left = widths.shape(family, inside, lengths[block])
        entries[name] = TensorEntry(entry.file, 0, 0, entry.dtype, left)

    with atomic_folder(out) as scratch:
        stored = fused.join(entries, family.blocks, family.fused)
        write_entries(stored, scratch / "model.safetensors", hollow=True)
        _write_about(checkpoint, shape, scratch)

    return out


def _write_about(checkpoint: Checkpoint, shape: Shape | None, folder: Path) -> None:
    """Write all files of a cut model that hold no weights."""
    for name in ("config.json", "README.md", "LICENSE", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)

    is_cut = shape is not None and shape != Shape.of(checkpoint)
    if is_cut or checkpoint.is_part or checkpoint.is_packed:
        _write_config(checkpoint, shape if is_cut else None, folder / "config.json")


def _renumber(checkpoint: Checkpoint, shape: Shape) -> dict[str, TensorEntry]:
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


def _write_config(checkpoint: Checkpoint, shape: Shape | None, file: Path) -> None:
    config = dict(checkpoint.written)
    if checkpoint.is_packed:  # what is written is not
        config.pop("quantization_config", None)
    if checkpoint.family.only:
        config = checkpoint.family.complete(config)

    if shape:
        if len(shape.blocks) < checkpoint.block_count:
            config |= checkpoint.block_kinds
        config = widths.write(config, shape.blocks, shape.widths)
        if shape.experts != checkpoint.experts:
            config[checkpoint.family.sizes["E"]] = shape.experts
            for key in _EXPERT_COUNTS & config.keys():  # transformers 5 may write another one
                config[key] = shape.experts

    if checkpoint.family.only:
        config |= checkpoint.family.write(config)
    # Heads that are fewer no longer say how wide one is.
    config["head_dim"] = checkpoint.head_size
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_entries(blocks: Path, kind: str) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in sorted(blocks.glob(f"{kind}-*.safetensors")):
        entries |= read_tensor_entries(file)
    return entries
