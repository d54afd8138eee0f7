"""The child process that holds llama.cpp: ``python -m racdeploy.backends._llamacpp_worker``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.backends import EngineSettings
from racdeploy.backends._messages import Header
from racdeploy.backends._worker import serve

if TYPE_CHECKING:
    from racdeploy.backends._llamacpp_native import NativeModel


def load(request: Header, settings: EngineSettings) -> NativeModel:
    """Load the GGUF file of a request."""
    from racdeploy.backends._llamacpp_native import NativeModel

    return NativeModel(Path(request["path"]), settings, use_mmap=request["use_mmap"])


if __name__ == "__main__":
    serve(load)
