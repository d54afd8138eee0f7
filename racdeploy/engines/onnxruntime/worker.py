"""The child process that holds onnxruntime: ``python -m racdeploy.engines.onnxruntime.worker``."""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.engine import EngineSettings
from racdeploy.decoding.messages import Header
from racdeploy.decoding.worker import LoadedModel, serve


def load(request: Header, settings: EngineSettings) -> LoadedModel:
    """Load the ONNX file of a request."""
    from racdeploy.engines.onnxruntime.native import OnnxModel

    return OnnxModel(Path(request["path"]), settings)


if __name__ == "__main__":
    serve(load)
