"""Prune a reasoning model, ship it to the edge, prove that it still reasons.

``racdeploy.build("./my-model", out="bundle")`` makes a bundle, ``racdeploy.load("bundle")`` gives a
model to run. What a function needs is imported when it is called: the import costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from racdeploy import errors
from racdeploy.errors import RacdeployError

if TYPE_CHECKING:
    from racdeploy.api.functions import (
        bench,
        build,
        compare,
        export,
        inspect,
        prune,
        record,
        recover,
        tune,
        verify,
    )
    from racdeploy.api.records import Bundle, ExportedFile, PrunedFolder, TunedBundle, Verdict
    from racdeploy.bundles.bench import BenchResult
    from racdeploy.bundles.inspect import Inspection
    from racdeploy.recipe import Recipe
    from racdeploy.runtime import (
        AsyncTextStream,
        Conversation,
        GenerationResult,
        Model,
        TextChunk,
        TextStream,
        load,
    )
    from racdeploy.verification.gate import Gate

    __version__: str

__all__ = [
    "AsyncTextStream",
    "BenchResult",
    "Bundle",
    "Conversation",
    "ExportedFile",
    "Gate",
    "GenerationResult",
    "Inspection",
    "Model",
    "PrunedFolder",
    "RacdeployError",
    "Recipe",
    "TextChunk",
    "TextStream",
    "TunedBundle",
    "Verdict",
    "__version__",
    "bench",
    "build",
    "compare",
    "errors",
    "export",
    "inspect",
    "load",
    "prune",
    "record",
    "recover",
    "tune",
    "verify",
]

_NOT_INSTALLED = "0+unknown"  # run from a folder that nobody installed
_HOMES = {
    "BenchResult": "racdeploy.bundles.bench",
    "Gate": "racdeploy.verification.gate",
    "Inspection": "racdeploy.bundles.inspect",
    "Recipe": "racdeploy.recipe",
}
"""Modules of the names that are in none of ``_SEARCHED``."""
_SEARCHED = ("racdeploy.runtime", "racdeploy.api.functions", "racdeploy.api.records")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from racdeploy.extras import installed_version

        value: Any = installed_version("racdeploy") or _NOT_INSTALLED
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in __all__:
        homes = map(importlib.import_module, _SEARCHED)
        value = next(getattr(home, name) for home in homes if hasattr(home, name))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
