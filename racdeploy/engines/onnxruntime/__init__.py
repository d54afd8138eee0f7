"""ONNX decoders on plain onnxruntime, in a child process: no torch and no onnxruntime-genai.

A lack of memory ends a process: the child dies then, and the parent raises EngineError. Its peak
memory is the engine's alone. The parent never imports onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.child_engine import ChildEngine
from racdeploy.decoding.engine import EngineSettings
from racdeploy.errors import ArtifactError
from racdeploy.plugins import require

ACCEL = True


class OnnxRuntimeEngine(ChildEngine):
    """An ONNX file, loaded by onnxruntime in a child process.

    ``cache_dtype`` and ``flash_attention`` do not apply: the graph decides.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ArtifactError: there is no such file.
        EngineError: onnxruntime refused the file or died of it, or its graph is not a decoder with
            a cache.
    """

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        require("onnxruntime")
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file", remedy="give an .onnx file")
        super().__init__("racdeploy.engines.onnxruntime.native", "onnxruntime", path, settings)


def open_engine(path: Path, settings: EngineSettings) -> OnnxRuntimeEngine:
    """Load an ONNX file."""
    return OnnxRuntimeEngine(path, settings)
