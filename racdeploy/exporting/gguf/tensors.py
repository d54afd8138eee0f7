"""Plan the tensors of a GGUF file: name, shape and number format, before anything is written."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.errors import ModelError
from racdeploy.exporting.gguf.architecture import find_architecture
from racdeploy.exporting.gguf.parameters import make_rope_factors
from racdeploy.models import mtp, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.decoder import Transform
from racdeploy.models.families import ANY_EXPERT, Family, expand_experts, generalize_expert
from racdeploy.models.tensor_coverage import check_tensors, list_used_tensors
from racdeploy.plugins import Names
from racdeploy.quant.grid import Floats
from racdeploy.quant.importance import Importance
from racdeploy.quant.presets import QuantChoice, QuantRules
from racdeploy.results.pruning import VECTORS_IN_F32
from racdeploy.tensors.safetensors import PackedEntry

# As llama.cpp's converter stores them, whatever the format of the file.
_IN_F32 = {
    ".ffn_gate_inp.weight": "the router of experts is stored in f32",
    "conv.weight": "convolutions are stored in f32",
    "conv1d.weight": "convolutions are stored in f32",
    ".altup_correct_coef.weight": "coefficients of hidden states are stored in f32",
    ".altup_predict_coef.weight": "coefficients of hidden states are stored in f32",
    ".ssm_a": VECTORS_IN_F32,
    ".ssm_d": VECTORS_IN_F32,
    "_norm.weight": VECTORS_IN_F32,
    ".bias": VECTORS_IN_F32,
}


@dataclass(frozen=True)
class GgufTensorPlan:
    """A tensor to write; fields of :class:`racdeploy.exporting.ExportedTensor` mean the same.

    Args:
        source: the first of several parts; of experts, their name with a ``*``.
        shape: as in the checkpoint, with the experts in front if there are any.
        parts: names in the checkpoint: one, one for each expert, or those fused into one matrix.
        row_split: index and count of the equal runs of rows into which the one part is split.
        computed_values: those of a tensor that the checkpoint does not hold.
        unfused_names: names of the parts where the family's usual architecture does not fuse them.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    requested_quant: str
    actual_quant: str
    reason: str
    parts: Names = ()
    transform: Transform | None = None
    row_split: tuple[int, int] = (0, 1)
    computed_values: Floats | None = None
    unfused_names: Names = ()

    def read(self, checkpoint: Checkpoint) -> Iterator[NDArray[Any]]:
        """Yield the arrays of the tensor, one in memory at a time."""
        if self.computed_values is not None:
            yield self.computed_values

        index, count = self.row_split
        for raw in map(checkpoint.read_raw, self.parts):
            rows = len(raw) // count
            yield raw[index * rows : (index + 1) * rows]

    def find_packed_parts(self, checkpoint: Checkpoint) -> list[PackedEntry]:
        """Return the parts if the checkpoint has all of them in the number format of the file."""
        entries = [checkpoint.all_entries[name] for name in self.parts]
        packed = [
            entry
            for entry in entries
            if isinstance(entry, PackedEntry) and entry.quant == self.actual_quant
        ]
        return packed if len(packed) == len(entries) else []

    def list_importances(self, known: Importance) -> list[Floats | None]:
        """Return the importance of the inputs of each array that :meth:`read` yields."""
        columns = self.shape[-1]
        if self.transform != "stack":
            return [known.for_weight(self.name, self.source, columns)] * max(1, len(self.parts))
        return [known.for_weight("", part, columns) for part in self.parts]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        row_bytes = round(self.shape[-1] * quants.load(self.actual_quant).bits / 8)
        return math.prod(self.shape[:-1]) * row_bytes


def plan_tensors(checkpoint: Checkpoint, mix: QuantRules) -> list[GgufTensorPlan]:
    """Plan every tensor of the file, in file order."""
    family = find_architecture(checkpoint)
    sources = _list_sources(checkpoint, family)
    shape = checkpoint.shape
    parts = {name: expand_experts(named, shape.num_experts) for name, named in sources.items()}

    _check_complete(checkpoint, family, {name for each in parts.values() for name in each})

    plan = [
        GgufTensorPlan(name, "", factors.shape, "f32", "f32", "", computed_values=factors)
        for name, factors in make_rope_factors(shape).items()
    ]

    for name, (source, *_) in sources.items():
        if parts[name][0] in checkpoint.entries:  # a linear may have no bias
            plan.append(_plan_tensor(checkpoint, mix, family, source, name, parts[name]))

    plan += _plan_unused_keys(checkpoint, mix, family)
    plan += _plan_mtp_head(checkpoint, mix, family)
    matrices = [tensor for tensor in plan if len(tensor.shape) > 1]
    mix.check([name for each in matrices for name in (each.name, *each.unfused_names)])
    return plan


def _plan_tensor(
    checkpoint: Checkpoint,
    mix: QuantRules,
    family: Family,
    source: str,
    name: str,
    parts: Names,
) -> GgufTensorPlan:
    for part in parts:
        _check_shape(checkpoint, part)

    _, inside = family.split_block(source)
    transform = "stack" if ANY_EXPERT in inside else family.transforms.get(inside)
    piece = (0, 1)
    # The file may split a matrix of the checkpoint into several tensors.
    if inside in family.block_tensors:
        stored = family.list_gguf_names(inside)
        piece = (stored.index(name.split(".", 2)[2]), len(stored))
    shape = _shape_in_file(checkpoint, family, name, parts, piece, transform)

    # The names of a fused tensor's parts in the family's usual architecture.
    unfused_names: Names = ()
    if len(parts) > 1:
        block = name.rpartition("blk.")[2].partition(".")[0]
        insides = [family.split_block(part)[1] for part in parts]
        usual = [checkpoint.family.block_tensors.get(each) for each in insides]  # None: an expert
        unfused_names = tuple(f"blk.{block}.{each}" for each in usual if each)
    choice = _choose(name, shape, mix, checkpoint, unfused_names)
    return GgufTensorPlan(
        name,
        source,
        shape,
        *choice,
        parts=parts,
        transform=transform,
        row_split=piece,
        unfused_names=unfused_names,
    )


def _plan_mtp_head(checkpoint: Checkpoint, mix: QuantRules, family: Family) -> list[GgufTensorPlan]:
    """Plan the multi-token-prediction head: blocks behind those of the model."""
    plan = []
    for source, entry in checkpoint.mtp_entries.items():
        block, inside = mtp.split_block(source)
        if block is None:
            assert family.mtp_head, "only families with a head have entries of it"
            stored = family.mtp_head.tensors
        else:
            stored = family.block_tensors
        name = f"blk.{checkpoint.shape.block_count + (block or 0)}.{stored[inside]}"

        transform = family.transforms.get(source if block is None else inside)
        choice = _choose(name, entry.shape, mix, checkpoint)
        plan.append(GgufTensorPlan(name, source, entry.shape, *choice, (source,), transform))

    return plan


def _plan_unused_keys(
    checkpoint: Checkpoint, mix: QuantRules, family: Family
) -> list[GgufTensorPlan]:
    """Plan zeros for the keys and values that llama.cpp requires and does not use."""
    plan = []
    for block, kinds in enumerate(checkpoint.shape.kinds if family.gguf_tensors.needs_keys else ()):
        for inside, stored in family.block_tensors.items():
            if family.has_tensor(kinds, inside) or not inside.endswith(".weight"):
                continue

            name = f"blk.{block}.{stored}"
            shape = widths.tensor_shape(family, inside, checkpoint.shape.sizes[block])
            choice = _choose(name, shape, mix, checkpoint)
            zeros = np.broadcast_to(np.float32(0), shape)  # takes no memory
            plan.append(GgufTensorPlan(name, "", shape, *choice, computed_values=zeros))

    return plan


def _shape_in_file(
    checkpoint: Checkpoint,
    family: Family,
    name: str,
    parts: Names,
    piece: tuple[int, int],
    transform: Transform | None,
) -> tuple[int, ...]:
    """Return the shape of a tensor in the file, rows first.

    A family may store it in another shape; parts of one matrix are stacked by rows.
    """
    block, _ = family.split_block(parts[0])
    shape = checkpoint.entries[parts[0]].shape

    if transform == "stack":
        return (len(parts), *shape)

    laid = family.gguf_tensors.shapes.get(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight"))
    if laid:
        sizes = checkpoint.shape.sizes[block or 0]
        return tuple(sizes[letter] for letter in laid)

    if len(shape) == 3 and shape[1] == 1:  # a convolution whose filters see one channel
        return (shape[0], shape[2])

    rows = sum(checkpoint.entries[part].shape[0] for part in parts)
    return (rows // piece[1], *shape[1:])


def _list_sources(checkpoint: Checkpoint, family: Family) -> dict[str, list[str]]:
    """Return name in the file → names in the checkpoint, for all tensors of the architecture."""
    # A tied model has no output matrix; some architectures need the embedding under that name, too.
    outside = dict(family.model_tensors)
    output = ""
    if checkpoint.tied:
        output = outside.pop("lm_head.weight", "")

    names = defaultdict[str, list[str]](list)
    for source, name in outside.items():
        names[name].append(source)
    if output and family.gguf_tensors.needs_output:
        names[output] = [family.embedding]

    for block, kinds in enumerate(checkpoint.shape.kinds):
        for source in family.block_tensors:
            if family.has_tensor(kinds, source):
                for name in family.list_gguf_names(source):
                    names[f"blk.{block}.{name}"].append(f"{family.blocks}.{block}.{source}")

    return names


def _check_complete(checkpoint: Checkpoint, family: Family, names: Set[str]) -> None:
    """Refuse missing and unknown tensors; a linear has a bias in all blocks or in none."""
    biases = {
        name: generalize_expert(family.split_block(name)[1])
        for name in names
        if name.endswith(".bias")
    }

    biased = {biases[name] for name in biases.keys() & list_used_tensors(checkpoint)}
    optional = {name for name, inside in biases.items() if inside not in biased}
    if family.state:
        optional |= {name for name in names if family.split_block(name)[1] in family.state.optional}

    check_tensors(checkpoint, names, optional)

    for name in sorted(biased):
        if family.block_tensors[name].removesuffix(".bias") not in family.biases:
            raise ModelError(
                "unsupported-by-llama-cpp",
                f"llama.cpp's {family.gguf_arch} models have no {name}, and this checkpoint does",
            )


def _check_shape(checkpoint: Checkpoint, source: str) -> None:
    family = checkpoint.family
    block, inside = family.split_block(source)
    expected = list(widths.tensor_shape(family, inside, checkpoint.shape.sizes[block or 0]))

    shape = list(checkpoint.entries[source].shape)
    if shape != expected:
        raise ModelError(
            "wrong-tensor-shape",
            f"{checkpoint.folder}: {source!r} has shape {shape}, its config.json means {expected}",
            remedy="the weights and the config belong to different models",
        )


def _choose(
    name: str,
    shape: tuple[int, ...],
    mix: QuantRules,
    checkpoint: Checkpoint,
    unfused_names: Names = (),
) -> QuantChoice:
    reasons_for_f32 = [reason for end, reason in _IN_F32.items() if name.endswith(end)]
    if len(shape) == 1:
        reasons_for_f32.append(VECTORS_IN_F32)
    if reasons_for_f32:
        return QuantChoice(mix.quant, "f32", "" if mix.quant == "f32" else reasons_for_f32[0])

    choice = mix.choose(name, checkpoint.shape.block_count, checkpoint.tied, unfused_names)
    actual, misfit = mix.fit_rows(choice.quant, shape[-1])
    return QuantChoice(choice.requested, actual, "; ".join(filter(None, [choice.reason, misfit])))
