"""Plan a GGUF file's tensors (name, shape, number format) and refuse before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.errors import ModelError
from racdeploy.export.gguf.architecture import find_architecture
from racdeploy.export.gguf.parameters import make_rope_factors
from racdeploy.models import further, widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors, list_used_tensors
from racdeploy.models.decoder import Transform
from racdeploy.models.families import Family, generalize, name_experts
from racdeploy.quant.importance import Importance
from racdeploy.quant.presets import Choice, Mix
from racdeploy.results.pruning import VECTORS_IN_F32
from racdeploy.tensors.mxfp4 import PackedEntry

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
# Where rows do not divide into blocks of 256: what keeps zeros falls back to what keeps them.
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q8_0", "q6_k": "q8_0"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write; see :class:`racdeploy.export.ExportedTensor` for what the two share.

    Args:
        source: the first of several parts; of experts, their name with a ``*``.
        shape: as in the checkpoint, experts first where there are any.
        parts: names in the checkpoint: one, one for each expert, or what is laid into one matrix.
        computed: the values of a tensor that the checkpoint does not hold.
        piece: which of how many equal runs of rows of its one part the tensor is.
        usual_names: of parts that are tensors of their own in the family's usual architecture.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    quant_asked: str
    quant_real: str
    reason: str
    parts: tuple[str, ...] = ()
    transform: Transform | None = None
    piece: tuple[int, int] = (0, 1)
    computed: NDArray[np.float32] | None = None
    usual_names: tuple[str, ...] = ()

    def read(self, checkpoint: Checkpoint) -> Iterator[NDArray[Any]]:
        """Yield the arrays that the tensor is made of, one in memory at a time."""
        if self.computed is not None:
            yield self.computed

        place, pieces = self.piece
        for raw in map(checkpoint.read_raw, self.parts):
            rows = len(raw) // pieces
            yield raw[place * rows : (place + 1) * rows]

    def list_packed(self, checkpoint: Checkpoint) -> list[PackedEntry]:
        """Return the parts, if the checkpoint holds each in the very codes of the file."""
        found = []
        for name in self.parts:
            entry = checkpoint.whole[name]
            if isinstance(entry, PackedEntry) and entry.stored_as == self.quant_real:
                found.append(entry)
        return found if len(found) == len(self.parts) else []

    def importances(self, known: Importance) -> list[NDArray[np.float32] | None]:
        """Return what is known of the inputs of each array that :meth:`read` yields."""
        columns = self.shape[-1]
        if self.transform != "stack":
            return [known.of(self.name, self.source, columns)] * max(1, len(self.parts))
        return [known.of("", part, columns) for part in self.parts]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        row_bytes = round(self.shape[-1] * quants.load(self.quant_real).BITS / 8)
        return math.prod(self.shape[:-1]) * row_bytes


def plan_tensors(checkpoint: Checkpoint, mix: Mix) -> list[PlannedTensor]:
    """Plan every tensor of the file, in file order."""
    family = find_architecture(checkpoint)
    sources = _list_sources(checkpoint, family)
    shape = checkpoint.shape
    parts = {name: name_experts(named, shape.num_experts) for name, named in sources.items()}

    _check_complete(checkpoint, family, {name for each in parts.values() for name in each})

    plan = [
        PlannedTensor(
            name=name,
            source="",
            shape=factors.shape,
            quant_asked="f32",
            quant_real="f32",
            reason="",
            computed=factors,
        )
        for name, factors in make_rope_factors(shape).items()
    ]

    for name, (source, *_) in sources.items():
        if parts[name][0] in checkpoint.entries:  # biases may be missing
            plan.append(_plan_tensor(checkpoint, mix, family, source, name, parts[name]))

    plan += _plan_unused_keys(checkpoint, mix, family)
    plan += _plan_further(checkpoint, mix, family)
    names = []
    for tensor in plan:
        if len(tensor.shape) > 1:
            names += [tensor.name, *tensor.usual_names]
    mix.check(names)
    return plan


def _plan_tensor(
    checkpoint: Checkpoint,
    mix: Mix,
    family: Family,
    source: str,
    name: str,
    parts: tuple[str, ...],
) -> PlannedTensor:
    for part in parts:
        _check_shape(checkpoint, part)

    _, inside = family.split_block(source)
    transform = family.transforms.get(inside)
    piece = (0, 1)
    if inside in family.block_tensors:
        stored = family.list_stored(inside)
        piece = (stored.index(name.split(".", 2)[2]), len(stored))
    shape = _lay(checkpoint, family, name, parts, piece, transform)

    usual_names = _list_usual_names(checkpoint.family, name, parts)
    choice = _choose(name, shape, mix, checkpoint, usual_names)
    return PlannedTensor(
        name,
        source,
        shape,
        *choice,
        parts=parts,
        transform=transform,
        piece=piece,
        usual_names=usual_names,
    )


def _plan_further(checkpoint: Checkpoint, mix: Mix, family: Family) -> list[PlannedTensor]:
    """Plan a head that predicts further tokens: blocks behind those of the model."""
    plan = []

    for source, entry in checkpoint.further.items():
        block, inside = further.split_block(source)
        if block is None:
            in_block = family.further[inside]
        else:
            in_block = family.block_tensors[inside]
        name = f"blk.{checkpoint.shape.block_count + (block or 0)}.{in_block}"

        transform = family.transforms.get(source if block is None else inside)
        choice = _choose(name, entry.shape, mix, checkpoint, ())
        plan.append(PlannedTensor(name, source, entry.shape, *choice, (source,), transform))

    return plan


def _plan_unused_keys(checkpoint: Checkpoint, mix: Mix, family: Family) -> list[PlannedTensor]:
    """Plan zeros for the keys and values that llama.cpp wants and does not compute."""
    plan = []
    for block, kinds in enumerate(checkpoint.shape.kinds if family.needs_keys else ()):
        for inside, stored in family.block_tensors.items():
            if family.has(kinds, inside) or not inside.endswith(".weight"):
                continue

            name = f"blk.{block}.{stored}"
            shape = widths.shape(family, inside, checkpoint.shape.sizes[block])
            choice = _choose(name, shape, mix, checkpoint, ())
            zeros = np.broadcast_to(np.float32(0), shape)  # without memory
            plan.append(PlannedTensor(name, "", shape, *choice, computed=zeros))

    return plan


def _lay(
    checkpoint: Checkpoint,
    family: Family,
    name: str,
    parts: tuple[str, ...],
    piece: tuple[int, int],
    transform: Transform | None,
) -> tuple[int, ...]:
    """Return the shape of a tensor in the file, rows first."""
    block, _ = family.split_block(parts[0])
    shape = checkpoint.entries[parts[0]].shape

    if transform == "stack":
        return (len(parts), *shape)

    laid = family.laid.get(re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight"))
    if laid:
        sizes = checkpoint.shape.sizes[block or 0]
        return tuple(sizes[letter] for letter in laid)

    if len(shape) == 3 and shape[1] == 1:  # a convolution whose filters see one channel
        return (shape[0], shape[2])

    rows = sum(checkpoint.entries[part].shape[0] for part in parts)
    return (rows // piece[1], *shape[1:])


def _list_sources(checkpoint: Checkpoint, family: Family) -> dict[str, list[str]]:
    """Return name in the file → names in the checkpoint, of all that the architecture may hold."""
    outside = dict(family.model_tensors)
    output = ""
    if checkpoint.tied:
        output = outside.pop("lm_head.weight", "")

    names: dict[str, list[str]] = {}
    for source, name in outside.items():
        names.setdefault(name, []).append(source)
    if output and family.needs_output:
        names[output] = [family.embedding]

    for block, kinds in enumerate(checkpoint.shape.kinds):
        for source in family.block_tensors:
            if not family.has(kinds, source):
                continue
            for name in family.list_stored(source):
                stored = names.setdefault(f"blk.{block}.{name}", [])
                stored.append(f"{family.blocks}.{block}.{source}")

    return names


def _check_complete(checkpoint: Checkpoint, family: Family, names: Set[str]) -> None:
    """Refuse missing and unknown tensors; a linear has biases in all blocks or in none."""
    biases = {
        name: generalize(family.split_block(name)[1]) for name in names if name.endswith(".bias")
    }

    biased = {biases[name] for name in biases.keys() & list_used_tensors(checkpoint)}
    optional = {name for name, inside in biases.items() if inside not in biased}

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
    expected = list(widths.shape(family, inside, checkpoint.shape.sizes[block or 0]))

    shape = list(checkpoint.entries[source].shape)
    if shape != expected:
        raise ModelError(
            "wrong-tensor-shape",
            f"{checkpoint.folder}: {source!r} has shape {shape}, its config.json means {expected}",
            remedy="the weights and the config belong to different models",
        )


def _list_usual_names(family: Family, name: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the parts of a tensor are called in the family's usual file, if otherwise."""
    if len(parts) == 1:
        return ()

    place = name.rpartition("blk.")[2].partition(".")[0]
    insides = [family.split_block(part)[1] for part in parts]
    usual = [family.block_tensors.get(inside) for inside in insides]  # None: an expert
    return tuple(f"blk.{place}.{each}" for each in usual if each)


def _choose(
    name: str,
    shape: tuple[int, ...],
    mix: Mix,
    checkpoint: Checkpoint,
    usual_names: tuple[str, ...],
) -> Choice:
    wide = [why for end, why in _IN_F32.items() if name.endswith(end)]
    if len(shape) == 1 or wide:
        why = wide[0] if wide else VECTORS_IN_F32
        if mix.quant == "f32":
            why = ""
        return Choice(mix.quant, "f32", why)

    choice = mix.choose(name, checkpoint.shape.block_count, checkpoint.tied, usual_names)
    chosen = choice.quant
    reasons = {choice.reason: None}  # in order, each once

    while why := quants.fits(quants.load(chosen), shape[-1]):
        chosen = _FALLBACKS.get(chosen, "f16")
        reasons[why] = None

    return Choice(choice.asked, chosen, "; ".join(filter(None, reasons)))
