"""Structures that can be removed from a model as a whole, one file per structure.

``SIZE_LETTER`` is the letter of the size that shrinks, as in a family's shapes, ``"L"`` for the
number of blocks and ``"V"`` for that of tokens. ``COUNT_UNIT`` names the units if a recipe may
give their number. ``layout(shape, block, structure) -> UnitLayout`` describes the units.
``check(checkpoint, structure)`` refuses an impossible cut with a UsageError.
``TEXT_KL``, where it was measured, is what a published model's text loses, by the share that is
kept; see :mod:`racdeploy.pruning.structure.measured_costs`.
``SCOPE`` is where the structure is cut, and so when:

- ``"model"``: before the walk over the blocks.
- ``"block"``: inside every block. Without a ``cut`` the units are inputs of the only linear that
  has ``SIZE_LETTER`` as its input.
- ``"folder"``: last. ``choose(checkpoint, keep, needed_ids) -> old_ids`` returns ids that stay, and
  ``rewrite(checkpoint, old_ids, out) -> Path`` writes the smaller model to another folder.

In the first two, ``cut(context) -> list[int]`` returns the units that stay. The criterion chooses
them in ``context.choose``, which takes units; see
:mod:`racdeploy.pruning.structure.prunable_units`.
"""

from __future__ import annotations

from types import ModuleType

from racdeploy import plugins
from racdeploy.recipe import Structure


def list_parts(structure: Structure, scope: str) -> dict[str, ModuleType]:
    """Return the plugins of the structures that a recipe cuts in a scope, by name."""
    parts = {part: plugins.load("structures", part) for part in structure.cut_parts}
    return {part: plugin for part, plugin in parts.items() if scope == plugin.SCOPE}
