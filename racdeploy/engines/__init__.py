"""Inference engines: the contract that backends/ keep, batching, sampling, and child processes.

An engine has ``open_engine(path, settings) -> Engine`` and says with ``ACCEL`` whether it takes
:mod:`racdeploy.sparse_kernels`' sparse kernels. Engines take and give token ids only.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy import plugins
from racdeploy.engines.engine import Engine, EngineSettings
from racdeploy.errors import UsageError


def open_engine(name: str, path: Path | str, settings: EngineSettings) -> Engine:
    """Load ``path`` with the engine of that plugin name; the path of ``openai`` is an address."""
    plugin = plugins.load("engines", name)

    if settings.accel == "require" and not plugin.ACCEL:
        raise UsageError(
            "engine-without-kernels",
            f"sparse kernels are required, and {name} has none to switch on",
            remedy="leave out --accel require",
        )

    engine: Engine = plugin.open_engine(path, settings)
    return engine
