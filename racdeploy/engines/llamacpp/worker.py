"""The child process that holds llama.cpp: ``python -m racdeploy.engines.llamacpp.worker``."""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.engine import EngineSettings
from racdeploy.decoding.messages import Header
from racdeploy.decoding.worker import LoadedModel, serve


def load(request: Header, settings: EngineSettings) -> LoadedModel:
    """Load the GGUF file of a request."""
    from racdeploy.engines.llamacpp.native import NativeModel

    return NativeModel(Path(request["path"]), settings, use_mmap=request["use_mmap"])


if __name__ == "__main__":
    serve(load)
