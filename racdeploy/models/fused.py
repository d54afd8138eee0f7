"""Tensors that hold what all experts of a block have at one place, taken apart and joined again.

Everything else knows each matrix of an expert by a name of its own. Only what lies on disk is
fused: here a file of such tensors is read expert by expert, and written as its publisher does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from racdeploy.errors import ModelError
from racdeploy.tensors.mxfp4 import BLOCK, PackedEntry
from racdeploy.tensors.safetensors import DTYPES, PACKED, Source, TensorEntry, widen

_CODES, _EXPONENTS = "_blocks", "_scales"  # ends of the names of what is stored as MXFP4
_WIDE = "F32"
_DAMAGED = "the weights and the config belong to different models"


@dataclass(frozen=True)
class Fused:
    """A tensor of all experts of a block, experts first.

    Args:
        parts: what each expert has in it, one behind the other along the outputs, with ``*`` for
            its number.
        alternating: whether outputs of the parts take turns instead.
        inputs_first: whether a matrix lies with its inputs as rows; as MXFP4 it never does.
    """

    parts: tuple[str, ...]
    alternating: bool = False
    inputs_first: bool = False

    def name(self, part: str, expert: int) -> str:
        """Return the name inside a block of what an expert has."""
        return part.replace("*", str(expert))


def take_apart(
    entries: Mapping[str, TensorEntry], blocks: str, fused: Mapping[str, Fused], experts: int
) -> dict[str, TensorEntry]:
    """Return tensors with those of each expert by names of their own.

    Args:
        entries: tensors by name, of a whole model.
        blocks: how names of blocks begin.
        fused: name inside a block → what the tensor holds.
        experts: how many each tensor must have.

    Raises:
        ModelError: a tensor cannot be what it should.
    """
    if not fused:
        return dict(entries)

    found: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        block, inside = _split(name, blocks)
        base = inside.removesuffix(_CODES)

        if inside in fused:
            parts = _take(name, entry, fused[inside], experts)
        elif base in fused and base != inside:
            parts = _unpack(name, entry, entries, fused[base], experts)
        elif name.endswith(_EXPONENTS) and name.removesuffix(_EXPONENTS) + _CODES in entries:
            continue
        else:
            parts = {inside: entry}

        for part, each in parts.items():
            if f"{block}{part}" in found:
                raise ModelError(
                    "tensor-stored-twice", f"{name}: {block}{part} is stored twice", remedy=_DAMAGED
                )
            found[f"{block}{part}"] = each

    return found


def _split(name: str, blocks: str) -> tuple[str, str]:
    """Return the beginning of a tensor's name up to its block, and the rest."""
    number, dot, inside = name.removeprefix(f"{blocks}.").partition(".")
    if not name.startswith(f"{blocks}.") or not number.isdecimal() or not dot:
        return "", name
    return f"{blocks}.{number}.", inside


def _take(name: str, entry: TensorEntry, fused: Fused, experts: int) -> dict[str, TensorEntry]:
    """Return the parts of a tensor: (experts, outputs), with inputs in front or behind or none."""
    shape = entry.shape
    outputs = 1
    if fused.inputs_first and len(shape) == 3:
        outputs = 2
    is_whole = len(shape) in (2, 3) and shape[0] == experts and 0 not in shape
    if not is_whole or shape[outputs] % len(fused.parts):
        raise ModelError(
            "damaged-experts",
            f"{name} has the shape {list(shape)}, which is not that of {experts} experts",
            remedy=_DAMAGED,
        )

    parts = {}
    for place, part in enumerate(fused.parts):
        for expert in range(experts):
            own = _find(entry, fused, expert, place, outputs)
            parts[fused.name(part, expert)] = own
    return parts


def _find(entry: TensorEntry, fused: Fused, expert: int, place: int, outputs: int) -> TensorEntry:
    """Return where one part of one expert lies, its outputs first; ``outputs`` is their axis."""
    itemsize = np.dtype(DTYPES[entry.dtype]).itemsize
    strides = [itemsize]
    for length in reversed(entry.shape[1:]):
        strides.insert(0, strides[0] * length)
    shape = list(entry.shape)

    count = len(fused.parts)
    step = strides[outputs]
    shape[outputs] //= count
    if fused.alternating:
        ahead = place * step
        strides[outputs] *= count
    else:
        ahead = place * step * shape[outputs]

    start = entry.start + expert * strides[0] + ahead
    reach = 0
    for length, stride in zip(shape[1:], strides[1:], strict=True):
        reach += (length - 1) * stride
    stop = start
    if 0 not in shape:
        stop = start + reach + itemsize

    axes = [outputs, *(axis for axis in range(1, len(shape)) if axis != outputs)]
    own_shape = tuple(shape[axis] for axis in axes)
    own_strides = tuple(strides[axis] for axis in axes)
    return TensorEntry(
        file=entry.file,
        start=start,
        stop=stop,
        dtype=entry.dtype,
        shape=own_shape,
        strides=own_strides,
    )


def _unpack(
    name: str,
    codes: TensorEntry,
    entries: Mapping[str, TensorEntry],
    fused: Fused,
    experts: int,
) -> dict[str, TensorEntry]:
    """Return the matrices of codes and exponents, which lie in two tensors."""
    other = name.removesuffix(_CODES) + _EXPONENTS
    exponents = entries.get(other)
    if exponents is None:
        raise ModelError(
            "damaged-experts",
            f"{name} has no {other} beside it",
            remedy="copy or download the model again",
        )

    shape = codes.shape
    are_bytes = codes.dtype == exponents.dtype == PACKED
    is_whole = len(shape) == 4 and shape[-1] == BLOCK // 2 and shape[1] % len(fused.parts) == 0
    is_whole = is_whole and shape[0] == experts and 0 not in shape
    if not (are_bytes and is_whole and shape[:-1] == exponents.shape):
        raise ModelError(
            "damaged-experts",
            f"{name} and {other} have the shapes {list(shape)} and {list(exponents.shape)}, which"
            f" are no MXFP4 of {experts} experts",
            remedy="copy or download the model again",
        )

    parts: dict[str, TensorEntry] = {}
    for place, part in enumerate(fused.parts):
        for expert in range(experts):
            own = [_find(each, fused, expert, place, 1) for each in (codes, exponents)]
            parts[fused.name(part, expert)] = PackedEntry.of(*own)
    return parts


@dataclass(frozen=True)
class Joined:
    """A tensor of all experts of a block, made of the matrices or biases of each."""

    fused: Fused
    experts: tuple[tuple[TensorEntry, ...], ...]  # the parts of each, as ``fused`` has them

    @property
    def dtype(self) -> str:
        """Return its dtype tag: that of all parts, or float32 where some have chosen codes."""
        tags = {part.dtype for parts in self.experts for part in parts}
        return tags.pop() if len(tags) == 1 else _WIDE

    @property
    def shape(self) -> tuple[int, ...]:
        """Return how long its axes are."""
        outputs, *inputs = self.experts[0][0].shape
        own = [outputs * len(self.fused.parts), *inputs]
        return (len(self.experts), *(reversed(own) if self.fused.inputs_first else own))

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes, an expert at a time."""
        dtype = self.dtype
        for parts in self.experts:
            values = [part.read() for part in parts]
            if any(part.dtype != dtype for part in parts):
                values = [widen(value) for value in values]
            joined = np.concatenate(values)
            if self.fused.alternating:
                joined = np.stack(values, 1).reshape(joined.shape)
            yield (joined.T if self.fused.inputs_first else joined).tobytes()


def join(
    entries: Mapping[str, TensorEntry], blocks: str, fused: Mapping[str, Fused]
) -> dict[str, Source]:
    """Return tensors as they lie on disk, in order of name: what :func:`take_apart` undoes."""
    left: dict[str, Source] = dict(entries)
    prefixes = dict.fromkeys(_split(name, blocks)[0] for name in entries)
    for block in filter(None, prefixes):
        for stored, each in fused.items():
            experts = list(_collect(left, block, each))
            if experts:
                left[f"{block}{stored}"] = Joined(each, tuple(experts))
    return dict(sorted(left.items()))


def _collect(
    left: dict[str, Source], block: str, fused: Fused
) -> Iterator[tuple[TensorEntry, ...]]:
    """Take the parts of each expert of a block out of ``left``, in order of number."""
    expert = 0
    while f"{block}{fused.name(fused.parts[0], expert)}" in left:
        parts = [left.pop(f"{block}{fused.name(part, expert)}") for part in fused.parts]
        yield tuple(part for part in parts if isinstance(part, TensorEntry))
        expert += 1
