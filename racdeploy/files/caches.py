"""Where results that can be made again are kept: folders under the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(part: str = "", variable: str = "") -> Path:
    """Return folder ``part`` (empty: all) of the user's cache, not made; ``variable`` moves it."""
    moved = os.environ.get(variable) if variable else None
    return Path(moved) if moved else platformdirs.user_cache_path("racdeploy", False) / part


def default_work() -> Path:
    """Return the folder of stage results: ``RACDEPLOY_WORK``, or the user's cache."""
    return cache_folder(variable="RACDEPLOY_WORK")
