"""Plan a GGUF file's tensors (name, shape, number format) and refuse before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.errors import ModelError
from racdeploy.export.gguf.parameters import make_rope_factors
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_tensors, list_used_tensors
from racdeploy.models.decoder import Transform
from racdeploy.quant.presets import Choice, Mix

# Where rows do not divide into blocks of 256: what keeps zeros falls back to what keeps them.
_FALLBACKS = {"q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q8_0", "q6_k": "q8_0"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to write; see :class:`racdeploy.export.ExportedTensor` for what the two share.

    Args:
        shape: as in the checkpoint, experts first where there are any.
        parts: names in the checkpoint: one, or one for each expert, whose source has a ``*``.
        computed: the values of a tensor that the checkpoint does not hold.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    quant_asked: str
    quant_real: str
    reason: str
    parts: tuple[str, ...] = ()
    transform: Transform | None = None
    computed: NDArray[np.float32] | None = None

    def read(self, checkpoint: Checkpoint) -> Iterator[NDArray[Any]]:
        """Yield the arrays that the tensor is made of, one in memory at a time."""
        if self.computed is not None:
            yield self.computed
        yield from map(checkpoint.read_raw, self.parts)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        row_bytes = round(self.shape[-1] * quants.load(self.quant_real).BITS / 8)
        return math.prod(self.shape[:-1]) * row_bytes


def plan_tensors(checkpoint: Checkpoint, mix: Mix) -> list[PlannedTensor]:
    """Plan every tensor of the file, in file order."""
    names = _list_names(checkpoint)
    parts = {source: _list_parts(checkpoint, source) for source in names}

    _check_complete(checkpoint, {name for each in parts.values() for name in each})

    plan = [
        PlannedTensor(name, "", factors.shape, "f32", "f32", "", computed=factors)
        for name, factors in make_rope_factors(checkpoint).items()
    ]

    for source, name in names.items():
        if parts[source][0] in checkpoint.entries:  # biases may be missing
            plan.append(_plan_tensor(checkpoint, mix, source, name, parts[source]))

    mix.check(tensor.name for tensor in plan if len(tensor.shape) > 1)
    return plan


def _plan_tensor(
    checkpoint: Checkpoint, mix: Mix, source: str, name: str, parts: tuple[str, ...]
) -> PlannedTensor:
    for part in parts:
        _check_shape(checkpoint, part, name)

    shape = checkpoint.entries[parts[0]].shape
    transform = checkpoint.family.transforms.get(_inside(checkpoint, source))
    if transform == "stack":
        shape = (len(parts), *shape)

    choice = _choose(name, shape, mix, checkpoint)
    return PlannedTensor(
        name, source, shape, choice.asked, choice.quant, choice.reason, parts, transform
    )


def _list_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return name in the checkpoint → name in the file, of all that the architecture may hold."""
    family = checkpoint.family

    names = dict(family.model_tensors)
    if checkpoint.tied:
        names.pop("lm_head.weight", None)

    for block in range(checkpoint.block_count):
        for source, name in family.block_tensors.items():
            names[f"{family.blocks}.{block}.{source}"] = f"blk.{block}.{name}"

    return names


def _list_parts(checkpoint: Checkpoint, source: str) -> tuple[str, ...]:
    if "*" not in source:
        return (source,)
    experts = range(checkpoint.integer("num_experts"))
    return tuple(source.replace("*", str(expert)) for expert in experts)


def _inside(checkpoint: Checkpoint, source: str) -> str:
    """Return the name inside its block, or the name itself outside the blocks."""
    prefix = f"{checkpoint.family.blocks}."
    return source.removeprefix(prefix).partition(".")[2] if source.startswith(prefix) else source


def _check_complete(checkpoint: Checkpoint, names: Set[str]) -> None:
    """Refuse missing and unknown tensors; a linear has biases in all blocks or in none."""
    family = checkpoint.family
    biases = {name: _inside(checkpoint, name) for name in names if name.endswith(".bias")}

    biased = {biases[name] for name in biases.keys() & list_used_tensors(checkpoint)}
    optional = {name for name, inside in biases.items() if inside not in biased}

    check_tensors(checkpoint, names, optional)

    for name in sorted(biased):
        if family.block_tensors[name].removesuffix(".bias") not in family.biases:
            raise ModelError(
                f"llama.cpp's {family.gguf_arch} models have no {name}, and this checkpoint does"
            )


def _check_shape(checkpoint: Checkpoint, source: str, name: str) -> None:
    *place, part, kind = name.split(".")
    sizes = checkpoint.sizes(int(place[-1]) if place else 0)

    expected = []

    for symbols in checkpoint.family.shapes.get(part, ("D",)):
        expected.append(sum(sizes[symbol] for symbol in symbols.split("+")))

    if kind == "bias":
        del expected[1:]

    shape = list(checkpoint.entries[source].shape)
    if shape != expected:
        raise ModelError(
            f"{checkpoint.folder}: {source!r} has shape {shape}, its config.json means {expected}",
            remedy="the weights and the config belong to different models",
        )


def _choose(name: str, shape: tuple[int, ...], mix: Mix, checkpoint: Checkpoint) -> Choice:
    is_router = name.endswith(".ffn_gate_inp.weight")
    if len(shape) == 1 or is_router:
        which = "the router of experts is" if is_router else "vectors are"
        return Choice(mix.quant, "f32", "" if mix.quant == "f32" else f"{which} stored in f32")

    choice = mix.choose(name, checkpoint.block_count, checkpoint.tied)
    chosen = choice.quant
    reasons = {choice.reason: None}  # in order, each once

    while why := quants.fits(quants.load(chosen), shape[-1]):
        chosen = _FALLBACKS.get(chosen, "f16")
        reasons[why] = None

    return Choice(choice.asked, chosen, "; ".join(filter(None, reasons)))
