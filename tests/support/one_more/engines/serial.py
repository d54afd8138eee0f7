"""llama.cpp, one sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from racdeploy.engines.backends import llamacpp
from racdeploy.engines.engine import Engine, EngineSettings

ACCEL = True


def open_engine(path: Path | str, settings: EngineSettings) -> Engine:
    """Start llama.cpp on a file."""
    return llamacpp.open_engine(Path(path), replace(settings, parallel=1))
