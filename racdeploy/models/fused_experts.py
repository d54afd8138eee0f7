"""Fused experts: tensors of all experts of a block, read expert by expert and fused again.

The rest of the package knows each matrix of an expert by its own name. Only files on disk hold
fused tensors, which are written in the layout of the model's publisher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.quant.stored_codes import CodedWeight
from racdeploy.tensors.mxfp4 import BLOCK, Mxfp4Entry
from racdeploy.tensors.safetensors import (
    BYTE_DTYPE,
    TensorEntry,
    WritableTensor,
    to_float32,
)

_CODES, _EXPONENTS = "_blocks", "_scales"  # ends of the names of what is stored as MXFP4
_WIDE = "F32"
_DAMAGED = "the weights and the config belong to different models"


@dataclass(frozen=True)
class FusedExperts:
    """A tensor of all experts of a block, experts first.

    Args:
        parts: names of an expert's matrices, concatenated along the outputs, with ``*`` for the
            expert's number.
        interleaved: True if the outputs of the parts are interleaved instead.
        inputs_first: True if the rows of a matrix are its inputs; never for MXFP4.
    """

    parts: tuple[str, ...]
    interleaved: bool = False
    inputs_first: bool = False

    def names(self, expert: int) -> list[str]:
        """Return the names of an expert's parts inside its block."""
        return [part.replace("*", str(expert)) for part in self.parts]


def unfuse(
    entries: Mapping[str, TensorEntry], blocks: str, fused: Mapping[str, FusedExperts], experts: int
) -> dict[str, TensorEntry]:
    """Return the tensors of a model, with every expert under its own names.

    Args:
        entries: tensors by name, of a whole model.
        blocks: prefix of the names of blocks.
        fused: name inside a block → layout of the tensor.
        experts: number of experts that each tensor must have.

    Raises:
        ModelError: a tensor has another shape than its layout needs, or is stored twice.
    """
    if not fused:
        return dict(entries)

    # MXFP4 comes as two tensors, codes and exponents; the pair is read with the codes.
    separate = {}
    for name, entry in entries.items():
        block, inside = _split(name, blocks)
        base = inside.removesuffix(_CODES)

        if inside in fused:
            parts = _take(name, entry, fused[inside], experts)
        elif base in fused and base != inside:
            parts = _unpack(name, entry, entries, fused=fused[base], experts=experts)
        elif name.endswith(_EXPONENTS) and name.removesuffix(_EXPONENTS) + _CODES in entries:
            continue
        else:
            parts = {inside: entry}

        for part, each in parts.items():
            if f"{block}{part}" in separate:
                raise ModelError(
                    "tensor-stored-twice", f"{name}: {block}{part} is stored twice", remedy=_DAMAGED
                )
            separate[f"{block}{part}"] = each

    return separate


def _split(name: str, blocks: str) -> tuple[str, str]:
    """Return a tensor's name up to and including its block, and the name inside it."""
    number, dot, inside = name.removeprefix(f"{blocks}.").partition(".")
    if not name.startswith(f"{blocks}.") or not number.isdecimal() or not dot:
        return "", name
    return f"{blocks}.{number}.", inside


def _take(
    name: str, entry: TensorEntry, fused: FusedExperts, experts: int
) -> dict[str, TensorEntry]:
    """Return the parts of a tensor of (experts, outputs), which may have an axis of inputs too."""
    # The axis of the outputs: a bias has no inputs, and a matrix may have them first.
    shape = entry.shape
    outputs = 2 if fused.inputs_first and len(shape) == 3 else 1
    is_whole = len(shape) in (2, 3) and shape[0] == experts and 0 not in shape
    if not is_whole or shape[outputs] % len(fused.parts):
        raise ModelError(
            "damaged-experts",
            f"{name} has the shape {list(shape)}, which is not that of {experts} experts",
            remedy=_DAMAGED,
        )

    return _list_parts(entry, fused, outputs)


def _list_parts(entry: TensorEntry, fused: FusedExperts, outputs: int) -> dict[str, TensorEntry]:
    """Return the parts of each expert, outputs first; ``outputs`` is their axis."""
    count = len(fused.parts)
    rows = entry.shape[outputs] // count
    shape = (rows, *entry.shape[1:outputs], *entry.shape[outputs + 1 :])
    before_outputs = [slice(None)] * (outputs - 1)

    parts: dict[str, TensorEntry] = {}
    for expert in range(entry.shape[0]):
        for index, name in enumerate(fused.names(expert)):
            chosen = slice(index * rows, (index + 1) * rows)
            if fused.interleaved:
                chosen = slice(index, None, count)

            parts[name] = _ExpertEntry(
                entry.file,
                start=entry.start,
                stop=entry.stop,
                dtype=entry.dtype,
                shape=shape,
                whole=entry,
                where=(expert, *before_outputs, chosen),
                is_transposed=outputs == 2,
            )

    return parts


@dataclass(frozen=True)
class _ExpertEntry(TensorEntry):
    """A part of one expert in a tensor of all, which has its rows and columns exchanged or not."""

    whole: TensorEntry
    where: tuple[int | slice, ...]
    is_transposed: bool

    def read(self) -> NDArray[Any]:
        stored = self.whole.map()[self.where]
        return np.array(stored.T if self.is_transposed else stored, order="C")

    def iter_bytes(self) -> Iterator[bytes]:
        yield self.read().tobytes()


def _unpack(
    name: str,
    codes: TensorEntry,
    entries: Mapping[str, TensorEntry],
    *,
    fused: FusedExperts,
    experts: int,
) -> dict[str, TensorEntry]:
    """Return the MXFP4 matrices of a tensor of codes and its tensor of exponents."""
    other = name.removesuffix(_CODES) + _EXPONENTS
    exponents = entries.get(other)
    if exponents is None:
        raise ModelError(
            "damaged-experts",
            f"{name} has no {other} beside it",
            remedy="copy or download the model again",
        )

    # (experts, outputs, blocks, bytes of a block); the exponents have one byte a block.
    shape = codes.shape
    are_bytes = codes.dtype == exponents.dtype == BYTE_DTYPE
    is_whole = len(shape) == 4 and shape[-1] == BLOCK // 2 and shape[1] % len(fused.parts) == 0
    is_whole = is_whole and shape[0] == experts and 0 not in shape
    if not (are_bytes and is_whole and shape[:-1] == exponents.shape):
        raise ModelError(
            "damaged-experts",
            f"{name} and {other} have the shapes {list(shape)} and {list(exponents.shape)}, which"
            f" are no MXFP4 of {experts} experts",
            remedy="copy or download the model again",
        )

    exponent_parts = _list_parts(exponents, fused, 1)
    return {
        part: Mxfp4Entry.from_parts(entry, exponent_parts[part])
        for part, entry in _list_parts(codes, fused, 1).items()
    }


@dataclass(frozen=True)
class FusedSource:
    """The source of a fused tensor, made of the matrices or biases of each expert."""

    fused: FusedExperts
    experts: tuple[tuple[TensorEntry, ...], ...]  # the parts of each, as ``fused`` has them

    @property
    def dtype(self) -> str:
        """The dtype tag: that of all parts, or float32 if they differ."""
        tags = {part.dtype for parts in self.experts for part in parts}
        return tags.pop() if len(tags) == 1 else _WIDE

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of its axes."""
        outputs, *inputs = self.experts[0][0].shape
        expert_shape = [outputs * len(self.fused.parts), *inputs]
        return (
            len(self.experts),
            *(reversed(expert_shape) if self.fused.inputs_first else expert_shape),
        )

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield its bytes, an expert at a time."""
        dtype = self.dtype
        for parts in self.experts:
            values = [part.read() for part in parts]
            if any(part.dtype != dtype for part in parts):
                values = [to_float32(value) for value in values]
            joined = np.concatenate(values)
            if self.fused.interleaved:
                joined = np.stack(values, 1).reshape(joined.shape)
            yield (joined.T if self.fused.inputs_first else joined).tobytes()


def fuse(
    entries: Mapping[str, TensorEntry], blocks: str, fused: Mapping[str, FusedExperts]
) -> dict[str, WritableTensor]:
    """Return tensors as they are stored on disk, in order of name; undoes :func:`unfuse`.

    Experts some of which are codes stay as they are.
    """
    tensors: dict[str, WritableTensor] = dict(entries)
    prefixes = dict.fromkeys(_split(name, blocks)[0] for name in entries)
    for block in filter(None, prefixes):
        for stored, layout in fused.items():
            experts = _list_experts(entries, block, layout)
            parts = list(chain.from_iterable(experts))
            if not parts or any(isinstance(entries[part], CodedWeight) for part in parts):
                continue

            for part in parts:
                del tensors[part]
            sources = []
            for names in experts:
                sources.append(tuple(entries[name] for name in names))
            tensors[f"{block}{stored}"] = FusedSource(layout, tuple(sources))

    return dict(sorted(tensors.items()))


def _list_experts(
    entries: Mapping[str, TensorEntry], block: str, layout: FusedExperts
) -> list[list[str]]:
    """Return the names of each expert's parts in a block; ``block`` is the prefix of its names."""
    experts: list[list[str]] = []
    while True:
        names = [f"{block}{part}" for part in layout.names(len(experts))]
        if names[0] not in entries:
            return experts
        experts.append(names)
