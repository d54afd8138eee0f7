"""Decide which blocks stay and how wide their parts are, once before the walk.

Blocks first. Widths then follow the errors that a look at the dense model finds: of each block a
curve over its width, scaled to what the cut alone changes of the block's output. Units go a step at
a time from where they are missed least.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import ModuleType

import torch

from racdeploy import plugins
from racdeploy.files.reading import read_json
from racdeploy.files.writing import write_atomic
from racdeploy.prune.structure.cut import Site
from racdeploy.prune.structure.layout import Layout, find_end, keep_alike
from racdeploy.prune.structure.outline import FILE, Outline, as_outline, whole
from racdeploy.prune.structure.removal import Removal
from racdeploy.prune.structures import list_parts
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.walk.session import Session
from racdeploy.prune.walk.survey import Effect, Observation, survey
from racdeploy.recipe import Structure


def decide_outline(session: Session, structure: Structure) -> Outline:
    """Return what stays, or read what an earlier run of this walk decided."""
    processes = session.processes
    file = session.folder / FILE

    if not processes.ask_first(file.is_file):
        outline = _decide(session, structure)
        if processes.first:
            write_atomic(file, json.dumps(asdict(outline), indent=1))

    return as_outline(processes.ask_first(lambda: read_json(file)))


def _decide(session: Session, structure: Structure) -> Outline:
    """Choose blocks, then the units of each part in each: by a survey, or as many everywhere."""
    shape = session.blocks.shape
    criterion = plugins.load("criteria", structure.criterion)
    outline = whole(shape)

    for part, plugin in list_parts(structure, "model").items():
        count = plugin.layout(shape, 0, structure).count(structure.share(part))
        outline = Outline(tuple(plugin.cut(Site(session, criterion, count))), {})

    layouts = {}
    for part in list_parts(structure, "block"):
        layouts[part] = outline.layouts(shape, part, structure)

    surveyed = {}
    if not structure.uniform and criterion.CALIBRATED:
        surveyed = {part: own for part, own in layouts.items() if not own[0].alike}
    curves = {}
    if surveyed:
        curves = _survey(session, criterion, outline.blocks, surveyed, structure)

    units = {}
    for part, own in layouts.items():
        share = structure.share(part)
        counts = keep_alike(own, share, uniform=structure.uniform)
        if part in curves:
            counts = allocate_units(own, curves[part], share)
        units[part] = tuple(counts)

    return Outline(outline.blocks, units)


def _survey(
    session: Session,
    criterion: ModuleType,
    blocks: Sequence[int],
    layouts: Mapping[str, Sequence[Layout]],
    structure: Structure,
) -> dict[str, list[dict[int, float]]]:
    """Return for each part the errors at the end of each block, by the units that stay in it."""
    wanted: dict[str, tuple[str, Layout]] = {}
    for part, own in layouts.items():
        linear = find_end(session.blocks.shape, own[0].letter)
        for block, layout in zip(blocks, own, strict=True):
            wanted[f"{session.blocks.prefix(block)}.{linear}"] = part, layout

    def observe(
        name: str, weight_OI: torch.Tensor, hessian: Hessian, effect: Effect
    ) -> Observation:
        part, layout = wanted[name]
        share = structure.share(part)
        return observe_widths(criterion, weight_OI, hessian, layout, effect, share)

    curves: dict[str, list[dict[int, float]]] = {part: [] for part in layouts}
    for name, found in survey(session, list(wanted), observe).items():
        curve = {int(count): error for count, error in found.items()}
        part, _ = wanted[name]
        curves[part].append(curve)

    return curves


def observe_widths(
    criterion: ModuleType,
    weight_OI: torch.Tensor,
    hessian: Hessian,
    layout: Layout,
    effect: Effect,
    share: float,
) -> Observation:
    """Return number of units that stay → share of the block's output that changes."""
    removal = Removal(weight_OI, hessian, layout)
    nearest = layout.nearest(share)

    losses: dict[int, float] = {}
    scale = 0.0

    for count in layout.counts:
        criterion.shrink(removal, count)
        losses[count] = loss = removal.loss()
        if loss > 0 and (count == nearest or not scale):
            scale = effect(removal.full()) / loss

    return {str(count): scale * loss for count, loss in losses.items()}


def allocate_units(
    layouts: Sequence[Layout], curves: Sequence[Mapping[int, float]], share: float
) -> list[int]:
    """Return the units of each block that lose least together, and in all are the share.

    Greedy along the lower hull of each curve, which is where the least sums of several lie.
    """
    falls = [_list_falls(curve) for curve in curves]

    heap: list[tuple[float, int, int]] = []
    for place, own in enumerate(falls):
        if own:
            price, _ = own[0]
            heapq.heappush(heap, (price, place, 0))

    counts = [layout.units for layout in layouts]
    wanted = share * sum(counts)

    while heap:
        _, place, step = heapq.heappop(heap)
        lower = falls[place][step][1]
        excess = sum(counts) - wanted
        if excess < (counts[place] - lower) / 2:  # staying is nearer
            continue

        counts[place] = lower
        following = step + 1
        if following < len(falls[place]):
            price, _ = falls[place][following]
            heapq.heappush(heap, (price, place, following))

    return counts


def _list_falls(curve: Mapping[int, float]) -> list[tuple[float, int]]:
    """Return price per unit and next count of each step down; prices rise along the lower hull."""
    counts = sorted(curve, reverse=True)
    hull = [counts[0]]

    for count in counts[1:]:
        while len(hull) > 1:
            above, last = hull[-2:]
            if _price(curve, above, last) <= _price(curve, last, count):
                break
            hull.pop()

        hull.append(count)

    falls: list[tuple[float, int]] = []

    for above, below in itertools.pairwise(hull):
        price = _price(curve, above, below)
        for count in counts:
            if below <= count < above:
                falls.append((price, count))

    return falls


def _price(curve: Mapping[int, float], above: int, below: int) -> float:
    return (curve[below] - curve[above]) / (above - below)
