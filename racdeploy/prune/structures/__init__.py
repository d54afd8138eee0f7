"""Structures: what of a model can be left out as a whole, one file per part.

``SIZE`` is the letter of what becomes smaller, as in a family's shapes, ``"L"`` for the number of
blocks and ``"V"`` for that of tokens; ``COUNTED`` names the units where a recipe may count them.
``layout(checkpoint, block, structure) -> Layout`` says what the units are and how many can stay;
``check(checkpoint, structure)`` refuses with a UsageError, before any work, what cannot be.
``STEP`` says when the part is cut:

- ``"model"``: before the walk over the blocks.
- ``"block"``: inside every block. Without a ``cut`` the units are inputs of the linear that alone
  has ``SIZE`` as its input.
- ``"folder"``: last. ``choose(checkpoint, keep, used) -> old_ids`` says what stays, and
  ``rewrite(checkpoint, old_ids, out) -> Path`` makes another model folder of the finished one.

Before the walk and in it, ``cut(site) -> list[int]`` returns the units that stay. It hands what
:mod:`racdeploy.prune.structure.units` describes to ``site.choose``; there the criterion chooses.
"""

from __future__ import annotations

from types import ModuleType

from racdeploy import plugins
from racdeploy.recipe import Structure


def list_parts(structure: Structure, step: str) -> dict[str, ModuleType]:
    """Return the structures that a recipe cuts at a step, by name."""
    parts = {part: plugins.load("structures", part) for part in structure.parts}
    return {part: plugin for part, plugin in parts.items() if step == plugin.STEP}
