"""Prune a reasoning model, ship it to the edge, prove that it still reasons.

``racdeploy.load("bundle/")`` gives a model to run. What it needs is imported on first use, so that
importing racdeploy costs nothing, and no torch ever comes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from racdeploy import errors
from racdeploy.errors import RacdeployError

if TYPE_CHECKING:
    from racdeploy.runtime import Model, Result, load

__all__ = ["Model", "RacdeployError", "Result", "__version__", "errors", "load"]

__version__ = "0.1.0"

_LAZY = ("Model", "Result", "load")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from racdeploy import runtime

    value = globals()[name] = getattr(runtime, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
