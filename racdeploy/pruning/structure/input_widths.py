"""Minimum number of inputs that a cut leaves to each linear that it narrows.

llama.cpp computes linears with 32 inputs wrongly on processors with AMX: with 96 tokens at once,
logits of Q8_0 and Q4_0 were off by more than the largest logit; 64 to 256 inputs, in steps of 32,
are right (llama-cpp-python 0.3.36). A cut model is refused on every processor, because it is built
on one and runs on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import list_axes, tensor_shape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.recipe import Structure

MIN_INPUTS = 64


class DescribeUnits(Protocol):
    """The ``layout`` of a structure's plugin."""

    def __call__(self, shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
        """Return the units of a block."""


def list_layouts(
    shape: ModelShape, blocks: Iterable[int], describe: DescribeUnits, structure: Structure
) -> list[UnitLayout]:
    """Return the units of a structure in blocks, without numbers that leave too few inputs."""
    return [_exclude_narrow(shape, block, describe(shape, block, structure)) for block in blocks]


def find_narrow_linear(shape: ModelShape, block: int, cut_sizes: Mapping[str, int]) -> str:
    """Return a linear of a block that a cut leaves fewer than MIN_INPUTS inputs; empty if none.

    A linear that the cut does not narrow is left out, however few inputs it has: it computes what
    it computed in the dense model, which its owner runs as it is.

    Args:
        cut_sizes: sizes of the block after the cut, by the letters of a family's shapes.
    """
    family = shape.family
    for name in family.block_tensors:
        if not family.has_tensor(shape.kinds[block], name) or len(list_axes(family, name)) < 2:
            continue

        inputs = tensor_shape(family, name, shape.sizes[block])[1]
        cut_inputs = tensor_shape(family, name, cut_sizes)[1]
        if cut_inputs < inputs and cut_inputs < MIN_INPUTS:
            return name.removesuffix(".weight")

    return ""


def _exclude_narrow(shape: ModelShape, block: int, layout: UnitLayout) -> UnitLayout:
    """Return a layout whose minimum count leaves every linear of a block enough inputs."""
    for count in reversed(layout.counts):
        cut_sizes = {**shape.sizes[block], **layout.sizes(count)}
        if not find_narrow_linear(shape, block, cut_sizes):
            return replace(layout, min_count=count)
    return layout
