"""Folders in the user's cache, for results that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder(part: str = "") -> Path:
    """Return a folder of the user's cache, which need not exist; the whole one without ``part``."""
    return platformdirs.user_cache_path("racdeploy", False) / part


def default_work_folder() -> Path:
    """Return the work folder: ``RACDEPLOY_WORK``, or the user's cache."""
    path = os.environ.get("RACDEPLOY_WORK")
    return Path(path) if path else cache_folder()
