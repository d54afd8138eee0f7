"""Folders in the user's cache, for results that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(part: str = "", variable: str = "") -> Path:
    """Return a folder of the user's cache, which need not exist.

    Args:
        part: name of the folder; empty for the whole cache.
        variable: environment variable that replaces the path.
    """
    path = os.environ.get(variable) if variable else None
    return Path(path) if path else platformdirs.user_cache_path("racdeploy", False) / part


def default_work_folder() -> Path:
    """Return the work folder: ``RACDEPLOY_WORK``, or the user's cache."""
    return cache_folder(variable="RACDEPLOY_WORK")
