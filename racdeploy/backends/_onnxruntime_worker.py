"""The child process that holds onnxruntime: ``python -m racdeploy.backends._onnxruntime_worker``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.backends import EngineSettings
from racdeploy.backends._messages import Header
from racdeploy.backends._worker import serve

if TYPE_CHECKING:
    from racdeploy.backends._onnx_native import OnnxModel


def load(request: Header, settings: EngineSettings) -> OnnxModel:
    """Load the ONNX file of a request."""
    from racdeploy.backends._onnx_native import OnnxModel

    return OnnxModel(Path(request["path"]), settings)


if __name__ == "__main__":
    serve(load)
