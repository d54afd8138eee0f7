"""Plan the tensors of a GGUF file: name, shape and number format, before anything is written."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.errors import ArtifactError, ModelError
from racdeploy.exporting.gguf.parameters import make_rope_factors
from racdeploy.models import mtp, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.conversion import Conversion, find_conversion
from racdeploy.models.decoder import Transform
from racdeploy.models.families import ANY_EXPERT, Family, expand_experts
from racdeploy.models.tensor_coverage import check_tensors
from racdeploy.plugins import Names
from racdeploy.quant.grid import Floats
from racdeploy.quant.importance import Importance
from racdeploy.quant.presets import QuantChoice, QuantRules
from racdeploy.results.pruning import VECTORS_IN_F32
from racdeploy.tensors.safetensors import PackedEntry, TensorEntry

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
        parts: tensors of the checkpoint by name: one, one for each expert, or those fused into one
            matrix.
        is_stacked: the parts are planes of the tensor, not runs of its rows.
        row_split: index and count of the equal runs of rows into which the one part is split.
        conversion: change of each part.
        computed_values: those of a tensor that the checkpoint does not hold.
        unfused_names: names of the parts where the family's usual architecture does not fuse them.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    requested_quant: str
    actual_quant: str
    reason: str
    parts: Mapping[str, TensorEntry] = field(default_factory=dict)
    is_stacked: bool = False
    row_split: tuple[int, int] = (0, 1)
    conversion: Conversion = field(default_factory=Conversion)
    computed_values: Floats | None = None
    unfused_names: Names = ()

    def read(self) -> Iterator[NDArray[Any]]:
        """Yield the arrays of the tensor as the checkpoint has them, one in memory at a time."""
        if self.computed_values is not None:
            yield self.computed_values

        index, count = self.row_split
        for entry in self.parts.values():
            raw = entry.read()
            rows = len(raw) // count
            yield raw[index * rows : (index + 1) * rows]

    @property
    def packed_parts(self) -> list[PackedEntry]:
        """The parts, if the checkpoint has all of them in the number format of the file."""
        packed = [
            entry
            for entry in self.parts.values()
            if isinstance(entry, PackedEntry) and entry.quant == self.actual_quant
        ]
        return packed if len(packed) == len(self.parts) else []

    @property
    def importance_sources(self) -> Names:
        """Names in the checkpoint of the weights whose importances the tensor takes."""
        return tuple(self.parts) if self.is_stacked else (self.source,)

    def list_importances(self, known: Importance) -> list[Floats | None]:
        """Return the importance of the inputs of each array that :meth:`read` yields."""
        columns = self.shape[-1]
        if self.is_stacked:
            return [known.for_weight("", part, columns) for part in self.parts]

        arrays = max(1, len(self.parts))
        return [known.for_weight(self.name, self.source, columns)] * arrays

    def has_importance(self, known: Importance) -> bool:
        """Return True if the importance of the inputs of any part is known."""
        return any(values_I is not None for values_I in self.list_importances(known))

    @property
    def uses_importance(self) -> bool:
        """True if its format rounds by the importance of inputs."""
        return quants.load_ggml(self.actual_quant).uses_importance

    @property
    def ggml_type(self) -> int:
        """Number of its format in ggml."""
        return quants.load_ggml(self.actual_quant).type_id

    @property
    def is_quantized(self) -> bool:
        """True if several weights share a scale."""
        return quants.load(self.actual_quant).block_size > 1

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        row_bytes = round(self.shape[-1] * quants.load(self.actual_quant).bits / 8)
        return math.prod(self.shape[:-1]) * row_bytes


def plan_tensors(checkpoint: Checkpoint, family: Family, mix: QuantRules) -> list[GgufTensorPlan]:
    """Plan every tensor of the file, in file order.

    Args:
        family: with the architecture of the file.
    """
    planner = _Planner(checkpoint, family, mix)
    tensors = _list_tensors(checkpoint, family)
    _check_complete(checkpoint, family, tensors)

    plan = planner.plan_rope_factors()
    for tensor in tensors:
        if tensor.parts[0] in checkpoint.entries:  # a linear may have no bias
            plan.append(planner.plan_tensor(tensor))

    plan += planner.plan_unused_keys()
    plan += planner.plan_mtp_head()

    matrices = [tensor for tensor in plan if len(tensor.shape) > 1]
    mix.check([name for tensor in matrices for name in (tensor.name, *tensor.unfused_names)])
    return plan


def describe_importance(
    known: Importance, plan: list[GgufTensorPlan], packed: Set[str] = frozenset()
) -> list[str]:
    """Return a note on the matrices rounded with an importance; refuse that of another model.

    Args:
        packed: names of the tensors that the checkpoint has in their format, so none is chosen.
    """
    quantized = [tensor for tensor in plan if tensor.is_quantized]
    weighted = [tensor for tensor in quantized if tensor.has_importance(known)]
    if quantized and not weighted:
        raise ArtifactError(
            "importance-of-other-model",
            f"{known.file} names no tensor of this model",
            remedy="leave export.importance out",
        )

    searched = sum(tensor.name not in packed and tensor.uses_importance for tensor in weighted)
    if not searched:
        return []
    return [
        f"scales of {searched} of {len(quantized)} quantized matrices are chosen by the importance"
        " of their inputs"
    ]


@dataclass
class _FileTensor:
    """A tensor of the architecture, whether or not the checkpoint has it.

    Args:
        block: None outside the blocks.
        insides: names of its parameters inside the block, of experts with a ``*``; several if they
            are fused.
        row_split: as of :class:`GgufTensorPlan`.
        sources: names of these parameters in the checkpoint.
        parts: the same, with all experts.
    """

    name: str
    block: int | None
    insides: list[str] = field(default_factory=list)
    row_split: tuple[int, int] = (0, 1)
    sources: Names = ()
    parts: Names = ()

    @property
    def inside_by_part(self) -> Iterator[tuple[str, str]]:
        """Pairs of a part and its name inside the block."""
        return zip(self.parts, itertools.cycle(self.insides), strict=False)


@dataclass(frozen=True)
class _Planner:
    """Planner of the tensors of one file."""

    checkpoint: Checkpoint
    family: Family
    mix: QuantRules

    def plan_rope_factors(self) -> list[GgufTensorPlan]:
        """Plan the divisors of rotary frequencies that rope scaling needs."""
        return [
            GgufTensorPlan(
                name=name,
                source="",
                shape=factors.shape,
                requested_quant="f32",
                actual_quant="f32",
                reason="",
                computed_values=factors,
            )
            for name, factors in make_rope_factors(self.checkpoint.shape).items()
        ]

    def plan_tensor(self, tensor: _FileTensor) -> GgufTensorPlan:
        """Plan a tensor of the architecture that the checkpoint has."""
        parts = {part: self.checkpoint.entries[part] for part in tensor.parts}
        first = parts[tensor.parts[0]]
        inside = tensor.insides[0]
        transform = self.family.transforms.get(inside)
        is_stacked = ANY_EXPERT in inside or transform == "stack"
        shape = (len(parts), *first.shape)
        if not is_stacked:
            shape = self._shape_in_file(tensor, list(parts.values()))

        part_size = first.size // tensor.row_split[1]
        unfused_names = self._list_unfused_names(tensor)
        choice = self._choose(tensor.name, shape, unfused_names)
        return GgufTensorPlan(
            name=tensor.name,
            source=tensor.sources[0],
            shape=shape,
            requested_quant=choice.requested,
            actual_quant=choice.quant,
            reason=choice.reason,
            parts=parts,
            is_stacked=is_stacked,
            row_split=tensor.row_split,
            conversion=self._find_conversion(transform, tensor.name, shape, part_size),
            unfused_names=unfused_names,
        )

    def plan_mtp_head(self) -> list[GgufTensorPlan]:
        """Plan the multi-token-prediction head: blocks behind those of the model."""
        family = self.family
        plan = []
        for source, entry in self.checkpoint.mtp_entries.items():
            block, inside = mtp.split_block(source)
            if block is None:
                assert family.mtp_head, "only families with a head have entries of it"
                stored = family.mtp_head.tensors[inside]
                transform = family.transforms.get(source)
            else:
                stored = family.block_tensors[inside]
                transform = family.transforms.get(inside)

            name = f"blk.{self.checkpoint.shape.block_count + (block or 0)}.{stored}"
            choice = self._choose(name, entry.shape)
            plan.append(
                GgufTensorPlan(
                    name=name,
                    source=source,
                    shape=entry.shape,
                    requested_quant=choice.requested,
                    actual_quant=choice.quant,
                    reason=choice.reason,
                    parts={source: entry},
                    conversion=self._find_conversion(transform, name, entry.shape, entry.size),
                )
            )

        return plan

    def plan_unused_keys(self) -> list[GgufTensorPlan]:
        """Plan zeros for the keys and values that llama.cpp requires and does not use."""
        family, shape = self.family, self.checkpoint.shape
        plan = []
        for block, kinds in enumerate(shape.kinds if family.gguf_tensors.needs_keys else ()):
            for inside, stored in family.block_tensors.items():
                if family.has_tensor(kinds, inside) or not inside.endswith(".weight"):
                    continue

                name = f"blk.{block}.{stored}"
                tensor_shape = widths.tensor_shape(family, inside, shape.sizes[block])
                choice = self._choose(name, tensor_shape)
                plan.append(
                    GgufTensorPlan(
                        name=name,
                        source="",
                        shape=tensor_shape,
                        requested_quant=choice.requested,
                        actual_quant=choice.quant,
                        reason=choice.reason,
                        computed_values=np.broadcast_to(np.float32(0), tensor_shape),  # no memory
                    )
                )

        return plan

    def _shape_in_file(self, tensor: _FileTensor, parts: Sequence[TensorEntry]) -> tuple[int, ...]:
        """Return the shape of a tensor in the file, rows first.

        A family may store it in another shape; parts of one matrix are joined by rows.
        """
        stored = re.sub(r"^blk\.\d+\.", "", tensor.name).removesuffix(".weight")
        axes = self.family.gguf_tensors.shapes.get(stored)
        if axes:
            sizes = self.checkpoint.shape.sizes[tensor.block or 0]
            return tuple(sizes[letter] for letter in axes)

        shape = parts[0].shape
        if len(shape) == 3 and shape[1] == 1:  # a convolution whose filters see one channel
            return (shape[0], shape[2])

        rows = sum(part.shape[0] for part in parts)
        return (rows // tensor.row_split[1], *shape[1:])

    def _find_conversion(
        self, transform: Transform | None, name: str, shape: tuple[int, ...], part_size: int
    ) -> Conversion:
        """Return the change of a tensor's parts, of ``part_size`` weights each."""
        part_shape = shape
        if len(shape) > 1:  # a file may have rows that no part has, or several parts
            part_shape = (part_size // shape[-1], shape[-1])
        return find_conversion(transform, self.checkpoint.shape, name, part_shape)

    def _list_unfused_names(self, tensor: _FileTensor) -> Names:
        """Return the names of a fused tensor's parts in the family's usual architecture."""
        if len(tensor.parts) == 1:
            return ()

        usual = self.checkpoint.family.block_tensors
        insides = [inside for inside in tensor.insides if ANY_EXPERT not in inside]
        return tuple(f"blk.{tensor.block}.{usual[inside]}" for inside in insides if inside in usual)

    def _choose(self, name: str, shape: tuple[int, ...], unfused_names: Names = ()) -> QuantChoice:
        mix = self.mix
        reasons_for_f32 = [reason for end, reason in _IN_F32.items() if name.endswith(end)]
        if len(shape) == 1:
            reasons_for_f32.append(VECTORS_IN_F32)
        if reasons_for_f32:
            return QuantChoice(mix.quant, "f32", "" if mix.quant == "f32" else reasons_for_f32[0])

        checkpoint = self.checkpoint
        choice = mix.choose(name, checkpoint.shape.block_count, checkpoint.tied, unfused_names)
        actual, misfit = mix.fit_rows(choice.quant, shape[-1])
        reason = "; ".join(filter(None, [choice.reason, misfit]))
        return QuantChoice(choice.requested, actual, reason)


def _list_tensors(checkpoint: Checkpoint, family: Family) -> list[_FileTensor]:
    """Return all tensors of the architecture, in file order."""
    # A tied model has no output matrix; some architectures need the embedding under that name, too.
    outside = dict(family.model_tensors)
    output = ""
    if checkpoint.tied:
        output = outside.pop("lm_head.weight", "")

    # A file may have several parameters in one tensor, or one parameter in several.
    tensors: dict[str, _FileTensor] = {}
    for inside, name in outside.items():
        tensors.setdefault(name, _FileTensor(name, None)).insides.append(inside)
    if output and family.gguf_tensors.needs_output:
        tensors[output] = _FileTensor(output, None, [family.embedding])

    for block, kinds in enumerate(checkpoint.shape.kinds):
        for inside in family.block_tensors:
            if not family.has_tensor(kinds, inside):
                continue
            names = family.list_gguf_names(inside)
            for index, stored in enumerate(names):
                name = f"blk.{block}.{stored}"
                made = _FileTensor(name, block, row_split=(index, len(names)))
                tensors.setdefault(name, made).insides.append(inside)

    experts = checkpoint.shape.num_experts
    for tensor in tensors.values():
        prefix = "" if tensor.block is None else f"{family.blocks}.{tensor.block}."
        tensor.sources = tuple(prefix + inside for inside in tensor.insides)
        tensor.parts = expand_experts(tensor.sources, experts)
    return list(tensors.values())


def _check_complete(checkpoint: Checkpoint, family: Family, tensors: Sequence[_FileTensor]) -> None:
    """Refuse missing, unknown and misshapen tensors; a linear has a bias in all blocks or none."""
    inside_by_part = {}
    shapes = {}
    for tensor in tensors:
        sizes = checkpoint.shape.sizes[tensor.block or 0]
        for part, inside in tensor.inside_by_part:
            inside_by_part[part] = inside
            shapes[part] = widths.tensor_shape(checkpoint.family, inside, sizes)

    used = checkpoint.used_entries
    biases = {part: inside for part, inside in inside_by_part.items() if part.endswith(".bias")}
    biased = {inside for part, inside in biases.items() if part in used}
    optional = {part for part, inside in biases.items() if inside not in biased}
    if family.state:
        allowed = family.state.optional
        optional |= {part for part, inside in inside_by_part.items() if inside in allowed}

    check_tensors(checkpoint, shapes, optional)

    for inside in sorted(biased):
        if family.block_tensors[inside].removesuffix(".bias") not in family.biases:
            raise ModelError(
                "unsupported-by-llama-cpp",
                f"llama.cpp's {family.gguf_arch} models have no {inside}, and this checkpoint does",
            )
