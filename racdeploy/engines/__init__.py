"""Inference engines: their contract, backends, batching, sampling and child processes.

A backend has ``open_engine(path, settings) -> Engine``, and its ``ACCEL`` is True where it can use
the kernels of :mod:`racdeploy.sparse_kernels`. ``find_parts(path)`` names the other files that it
opens with an artifact, relative to its folder. Engines take and return token ids only.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy import plugins
from racdeploy.engines.engine import Engine, EngineSettings
from racdeploy.errors import UsageError


def open_engine(name: str, path: Path | str, settings: EngineSettings) -> Engine:
    """Load an artifact with an engine; the path of the engine ``server`` is an address."""
    plugin = plugins.load("engines", name)

    if settings.accel == "require" and not plugin.ACCEL:
        raise UsageError(
            "engine-without-kernels",
            f"sparse kernels are required, and the engine {name} has none",
            remedy="leave out --accel require",
        )

    engine: Engine = plugin.open_engine(path, settings)
    return engine
