"""Recipe of a build: its sections, validated, and the merge of target, recipe file and options.

Precedence, low to high: defaults, target, recipe file, command-line options. A recipe that exceeds
a limit of its target is an error. ``recipe.toml`` explains every key.
"""

from __future__ import annotations

from racdeploy.recipe.export import MAX_TOKEN_DIFFERENCES, Export
from racdeploy.recipe.pruning import Pruning, SparsityOrPattern, parse_pattern, sparsity_of
from racdeploy.recipe.recipe import EXAMPLE, Recipe
from racdeploy.recipe.recovery import Recovery
from racdeploy.recipe.search import LadderLimits, Tune
from racdeploy.recipe.section import check_plugin
from racdeploy.recipe.structure import Structure
from racdeploy.recipe.traces import Calibration, Traces
from racdeploy.recipe.verification import Runtime, Thinking, Verification

__all__ = [
    "EXAMPLE",
    "MAX_TOKEN_DIFFERENCES",
    "Calibration",
    "Export",
    "LadderLimits",
    "Pruning",
    "Recipe",
    "Recovery",
    "Runtime",
    "SparsityOrPattern",
    "Structure",
    "Thinking",
    "Traces",
    "Tune",
    "Verification",
    "check_plugin",
    "parse_pattern",
    "sparsity_of",
]
