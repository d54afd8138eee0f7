"""One way to store each tensor, with the least sum of errors that a number of bytes allows.

What one tensor of the file holds (experts, or queries, keys and values) has one choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from racdeploy import quant
from racdeploy.errors import UsageError
from racdeploy.export.gguf.body import align
from racdeploy.export.gguf.tensors import PlannedTensor, plan_tensors
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.surveyed import Option, Stored, Surveyed
from racdeploy.quant import presets
from racdeploy.recipe import Zeros
from racdeploy.tune.candidates import find_packing
from racdeploy.tune.knapsack import Choices, solve
from racdeploy.tune.packed import expect_saved_bytes

_OTHERS = "q8_0"  # what nobody surveyed: few bytes
_OUTPUT = "output.weight"
_BLOCK = re.compile(r"^blk\.(\d+)\.")

Size = Callable[[PlannedTensor, Option], int]
"""Bytes of a tensor that is stored in one way."""


@dataclass(frozen=True)
class Way:
    """One way to store a tensor.

    Args:
        option: key of an :class:`~racdeploy.prune.surveyed.Option`; empty without a choice.
        size_bytes: in the file, padding included.
        error: sum of what it changes at the ends of the blocks.
    """

    option: str
    size_bytes: int
    error: float


@dataclass(frozen=True)
class Mix:
    """A way for each matrix of a file, by the tensor's name, and what all tensors take."""

    ways: Mapping[str, Way]
    size_bytes: int
    error: float

    def export(self) -> dict[str, Any]:
        """Return ``quant`` and ``tensors`` of a recipe's ``export``."""
        quants = {}
        sizes: dict[str, int] = {}

        for name, way in self.ways.items():
            if not way.option:
                continue

            chosen = Option.parse(way.option).quant
            quants[name] = chosen
            if _BLOCK.match(name):
                sizes[chosen] = sizes.get(chosen, 0) + way.size_bytes

        usual = max(sizes, key=lambda each: (sizes[each], each))
        return {"quant": usual, "tensors": _name_tensors(quants, usual)}

    def zeros(self, plan: Sequence[PlannedTensor]) -> dict[str, Zeros]:
        """Return the zeros of every linear, a share or N:M, by its name in the checkpoint."""
        zeros: dict[str, Zeros] = {}

        for tensor in plan:
            key = self.ways[tensor.name].option
            if not key or not _BLOCK.match(tensor.name):
                continue

            option = Option.parse(key)
            for part in tensor.parts:
                linear = part.removesuffix(".weight")
                zeros[linear] = option.pattern or option.sparsity

        return zeros


def plain_bytes(tensor: PlannedTensor, option: Option) -> int:
    """Return the bytes of a tensor in a plain file."""
    stored = replace(tensor, quant_real=option.quant)
    return align(stored.size_bytes)


def packed_bytes(tensor: PlannedTensor, option: Option) -> int:
    """Return about the bytes of a tensor in a file that leaves zeros out."""
    plain = plain_bytes(tensor, option)
    if not option.sparsity:
        return plain

    stored = replace(tensor, quant_real=option.quant)
    zeros = option.pattern or option.sparsity
    saved = expect_saved_bytes(find_packing("gguf"), stored, zeros)
    return align(plain - math.floor(saved))


def plan(checkpoint: Checkpoint) -> list[PlannedTensor]:
    """Return every tensor of a GGUF file; what nobody surveyed has 8 bits."""
    return plan_tensors(checkpoint, presets.read(_OTHERS))


def list_errors(
    checkpoint: Checkpoint, tensors: Sequence[PlannedTensor], surveyed: Surveyed
) -> dict[str, dict[str, float]]:
    """Return tensor → what each way to store it changes; nothing where nobody surveyed it.

    Errors of linears of one tensor are added up, those of a linear whose rows are several tensors
    are shared out among these. An embedding that is the head has both.
    """
    errors = {}
    names = [tensor.name for tensor in tensors]
    is_head = _OUTPUT not in names  # the embedding is

    for tensor in tensors:
        if tensor.name == _OUTPUT:
            found = [surveyed.head]
        elif tensor.parts == (checkpoint.family.embedding,):
            found = [surveyed.embedding]
            if is_head:
                found.append(surveyed.head)
        else:
            linears = [part.removesuffix(".weight") for part in tensor.parts]
            found = [surveyed.linears.get(linear, {}) for linear in linears]

        errors[tensor.name] = _add_up(tensor, found)

    return errors


def list_ways(
    checkpoint: Checkpoint,
    tensors: Sequence[PlannedTensor],
    surveyed: Surveyed,
    size: Size = plain_bytes,
    keep: Callable[[Option], bool] = lambda option: True,
) -> dict[str, list[Way]]:
    """Return tensor → ways to store it; of what was not surveyed, the planned one alone.

    Args:
        tensors: of :func:`plan`.
        size: bytes of a tensor that is stored in one way.
        keep: which options of the survey count.
    """
    ways = {}
    errors = list_errors(checkpoint, tensors, surveyed)

    for tensor in tensors:
        own = []
        for key, error in errors[tensor.name].items():
            option = Option.parse(key)
            if keep(option):
                own.append(Way(key, size(tensor, option), error))

        ways[tensor.name] = own or [_as_planned(tensor)]

    return ways


def choose(ways: Mapping[str, Sequence[Way]], most_bytes: int) -> Mix:
    """Return one way for each tensor, of the least sum of errors within a number of bytes.

    Raises:
        UsageError: not even the smallest ways fit.
    """
    chosen = {}
    free = {}

    for name, own in ways.items():
        useful = _drop_dominated(own)
        chosen[name] = useful[0]
        if len(useful) > 1:
            free[name] = useful

    least_bytes = sum(way.size_bytes for way in chosen.values())
    if least_bytes > most_bytes:
        raise UsageError(
            f"the tensors take at least {least_bytes:,} bytes, and {most_bytes:,} are allowed",
            remedy=f"allow {least_bytes:,}, or more options with fewer bits",
        )

    if free:
        chosen |= _solve(free, most_bytes - least_bytes)

    total_bytes = sum(way.size_bytes for way in chosen.values())
    assert total_bytes <= most_bytes, "the budget is exact"
    error = sum(way.error for way in chosen.values())
    return Mix(chosen, total_bytes, error)


def _solve(ways: Mapping[str, Sequence[Way]], more_bytes: int) -> dict[str, Way]:
    """Return the best way for each tensor, with so many bytes more than the smallest ones take."""
    sizes = []
    errors = []
    for own in ways.values():
        bytes_M = np.array([way.size_bytes for way in own], np.int64)
        sizes.append(bytes_M - bytes_M[0])
        errors.append(np.array([way.error for way in own]))

    unit = int(np.gcd.reduce(np.concatenate(sizes)))
    lists = []
    for extra_M, error_M in zip(sizes, errors, strict=True):
        lists.append(Choices(extra_M // unit, error_M))

    chosen = {}
    found = solve(lists, more_bytes // unit)
    for (name, own), index in zip(ways.items(), found, strict=True):
        chosen[name] = own[index]

    return chosen


def _drop_dominated(ways: Sequence[Way]) -> list[Way]:
    """Return the ways that no other beats in bytes and error, the smallest first."""
    kept: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.size_bytes, way.error)):
        if not kept or way.error < kept[-1].error:
            kept.append(way)
    return kept


def _add_up(tensor: PlannedTensor, found: Sequence[Mapping[str, Stored]]) -> dict[str, float]:
    """Return what each way that all parts of a tensor have changes in them together."""
    errors: dict[str, float] = {}
    _, pieces = tensor.piece

    for key in found[0] if found else ():
        form = quant.load(Option.parse(key).quant)
        is_common = all(key in each for each in found)
        if is_common and not quant.fits(form, tensor.shape[-1]):
            errors[key] = sum(each[key].error for each in found) / pieces

    return errors


def _as_planned(tensor: PlannedTensor) -> Way:
    planned = Option(tensor.quant_real)
    name = "" if planned.quant == "f32" else planned.key  # the export keeps those by itself
    return Way(name, plain_bytes(tensor, planned), 0.0)


def _name_tensors(quants: Mapping[str, str], usual: str) -> dict[str, str]:
    """Return patterns → number formats, of all tensors but those of blocks that have the usual."""
    alike: dict[tuple[str, str], list[str]] = {}
    patterns: dict[str, str] = {}

    for name, chosen in quants.items():
        match = _BLOCK.match(name)
        if not match:
            pattern = re.escape(name)
            patterns[f"^{pattern}$"] = chosen
        elif chosen != usual:
            inside = name[match.end() :]
            blocks = alike.setdefault((inside, chosen), [])
            blocks.append(match[1])

    for (inside, chosen), blocks in alike.items():
        numbers = "|".join(blocks)
        pattern = re.escape(inside)
        patterns[rf"^blk\.({numbers})\.{pattern}$"] = chosen

    return patterns
