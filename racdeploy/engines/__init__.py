"""Inference engines: one file per engine, all with the same small contract.

An engine file has ``open_engine(path, settings) -> Engine``. Engines take and give token ids only: rendering
the chat template and splitting the thinking from the answer happen in ``racdeploy.runtime``, the same way for every
engine.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from racdeploy import plugins
from racdeploy.decoding.engine import Engine, EngineSettings
from racdeploy.errors import UsageError

__all__ = ["open_engine", "opened"]


def open_engine(name: str, path: Path | str, settings: EngineSettings) -> Engine:
    """Load ``path`` with the engine of that plugin name; the path of ``openai`` is an address.

    Raises:
        UsageError: sparse kernels are required of an engine that has none to switch on.
    """
    if settings.accel == "require" and name not in ("llamacpp", "onnxruntime"):
        raise UsageError(
            f"sparse kernels are required, and {name} has none to switch on",
            remedy="leave out --accel require",
        )
    engine: Engine = plugins.load("engines", name).open_engine(path, settings)
    return engine


def opened(name: str, path: Path | str, settings: EngineSettings) -> AbstractContextManager[Engine]:
    """Return :func:`open_engine`'s engine for a ``with`` block, which closes it."""
    return contextlib.closing(open_engine(name, path, settings))
