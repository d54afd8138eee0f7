"""Prune a reasoning model, ship it to the edge, prove that it still reasons.

``racdeploy.load("bundle/")`` gives a model to run. What it needs is imported on first use, so that
importing racdeploy costs nothing, and no torch ever comes with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from racdeploy import errors
from racdeploy.errors import RacdeployError

if TYPE_CHECKING:
    from racdeploy.runtime import (
        AsyncTextStream,
        Conversation,
        Model,
        Piece,
        Result,
        TextStream,
        load,
    )

    __version__: str

__all__ = [
    "AsyncTextStream",
    "Conversation",
    "Model",
    "Piece",
    "RacdeployError",
    "Result",
    "TextStream",
    "__version__",
    "errors",
    "load",
]

_NOT_INSTALLED = "0+unknown"  # run from a folder that nobody installed
_LAZY = ("AsyncTextStream", "Conversation", "Model", "Piece", "Result", "TextStream", "load")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _find_version()
    elif name in _LAZY:
        from racdeploy import runtime

        value = getattr(runtime, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})


def _find_version() -> str:
    """Return the version that the build took from the git tag."""
    from racdeploy.extras import installed_version

    return installed_version("racdeploy") or _NOT_INSTALLED
