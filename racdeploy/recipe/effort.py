"""Effort of a build: how many tokens it calibrates on, and by how many questions it compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from racdeploy.recipe_settings import RecipeSettings

Effort = Literal["quick", "default", "thorough"]

EFFORTS: Mapping[str, RecipeSettings] = {
    "quick": {"calibration": {"max_tokens": 8_192}, "verify": {"count": 100}},
    "default": {},
    "thorough": {
        "traces": {"count": 1_024},
        "calibration": {"max_tokens": 131_072},
        "verify": {"count": 1_000},
    },
}
"""Settings of each effort, over those that a target proposes, and under those that a user sets.

benchmarks/RESULTS.md, "Tokens to calibrate on", has what more tokens gain.
"""
