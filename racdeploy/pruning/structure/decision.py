"""Decision, before the walk, which blocks stay and how many units of each structure.

Blocks are chosen first. Then a survey of the dense model gives a curve of each block's error over
its width, scaled to the change of the block's output when it alone is cut. Units are removed
greedily, one step at a time, where that costs least.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import itemgetter

from torch import Tensor

from racdeploy import plugins
from racdeploy.pruning import CUT_PLAN_FILE
from racdeploy.pruning.structure.cut import CutContext
from racdeploy.pruning.structure.cut_plan import CutPlan, keep_everything, parse_cut_plan
from racdeploy.pruning.structure.input_units import InputUnits
from racdeploy.pruning.structure.layout import UnitLayout, find_consumer
from racdeploy.pruning.structure.shares import nearest_counts
from racdeploy.pruning.structures import list_parts
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.survey import Effect, Observation, survey
from racdeploy.recipe import Structure


def decide_cut_plan(session: PruningSession, structure: Structure) -> CutPlan:
    """Return the cut plan: decide it, or read what an interrupted run decided."""
    return session.decide_once(CUT_PLAN_FILE, lambda: _decide(session, structure), parse_cut_plan)


def _decide(session: PruningSession, structure: Structure) -> CutPlan:
    """Choose blocks, then the units of each structure: by a survey, or equally in all blocks."""
    shape = session.model.shape
    criterion = plugins.load("criteria", structure.criterion)
    outline = keep_everything(shape)

    for part, plugin in list_parts(structure, "model").items():
        count = plugin.layout(shape, 0, structure).count(structure.kept_share(part))
        outline = CutPlan(tuple(plugin.cut(CutContext(session, criterion, count))), {})

    parts = list_parts(structure, "block")
    layouts = {part: outline.layouts(shape, part, structure) for part in parts}

    # Only where blocks may differ in width, and by a criterion that uses traces.
    surveyed = {}
    if not structure.uniform and criterion.USES_TRACES:
        for part, part_layouts in layouts.items():
            if not part_layouts[0].is_uniform:
                surveyed[part] = part_layouts
    curves = {}
    if surveyed:
        curves = _survey(session, outline.blocks, surveyed, structure)

    units = {}
    for part, part_layouts in layouts.items():
        share = structure.kept_share(part)
        counts = nearest_counts(part_layouts, share, uniform=structure.uniform)
        if part in curves:
            counts = allocate_units(part_layouts, curves[part], share)
        units[part] = tuple(counts)

    return CutPlan(outline.blocks, units)


def _survey(
    session: PruningSession,
    blocks: Sequence[int],
    layouts: Mapping[str, Sequence[UnitLayout]],
    structure: Structure,
) -> dict[str, list[dict[int, float]]]:
    """Return structure → for each block, units that stay → relative error of its output."""
    criterion = plugins.load("criteria", structure.criterion)
    wanted = {}
    for part, part_layouts in layouts.items():
        linear = find_consumer(session.model.shape, part_layouts[0].letter)
        for block, layout in zip(blocks, part_layouts, strict=True):
            wanted[f"{session.model.prefix(block)}.{linear}"] = part, layout

    def observe(name: str, weight_OI: Tensor, hessian: Hessian, effect: Effect) -> Observation:
        part, layout = wanted[name]
        removal = InputUnits(weight_OI, hessian, layout)
        nearest = layout.nearest_count(structure.kept_share(part))

        # The effect is measured once, near the wanted share, and scales all losses.
        losses = {}
        scale = 0.0
        for count in layout.counts:
            criterion.remove_units(removal, count)
            losses[count] = loss = removal.loss()
            if loss > 0 and (count == nearest or not scale):
                scale = effect(removal.weights_with_zeros()) / loss

        return {str(count): scale * loss for count, loss in losses.items()}

    curves: dict[str, list[dict[int, float]]] = {part: [] for part in layouts}
    for name, observation in survey(session, list(wanted), observe).items():
        curve = {int(count): error for count, error in observation.items()}
        part, _ = wanted[name]
        curves[part].append(curve)

    return curves


def allocate_units(
    layouts: Sequence[UnitLayout], curves: Sequence[Mapping[int, float]], share: float
) -> list[int]:
    """Return how many units of each block stay, with the least total error at this share.

    The search is greedy along the lower convex hull of each curve, where greedy steps are optimal.
    """
    steps = []
    for index, curve in enumerate(curves):
        steps += [(price, index, count) for price, count in _list_steps(curve)]

    counts = [layout.units for layout in layouts]
    wanted = share * sum(counts)

    # A stable sort: steps of a block that cost the same stay in order.
    for _, index, lower in sorted(steps, key=itemgetter(0, 1)):
        excess = sum(counts) - wanted
        if excess >= (counts[index] - lower) / 2:  # else the total is nearer without this step
            counts[index] = lower

    return counts


def _list_steps(curve: Mapping[int, float]) -> list[tuple[float, int]]:
    """Return price per unit and next count of each step down; prices rise along the hull."""
    counts = sorted(curve, reverse=True)
    hull = [counts[0]]

    # Drop a point where the longer step over it is cheaper per unit.
    for count in counts[1:]:
        while len(hull) > 1:
            above, last = hull[-2:]
            if _price(curve, above, last) <= _price(curve, last, count):
                break
            hull.pop()

        hull.append(count)

    # Counts between two points of the hull are steps at the hull's price.
    return [
        (_price(curve, above, below), count)
        for above, below in itertools.pairwise(hull)
        for count in counts
        if below <= count < above
    ]


def _price(curve: Mapping[int, float], above: int, below: int) -> float:
    return (curve[below] - curve[above]) / (above - below)
