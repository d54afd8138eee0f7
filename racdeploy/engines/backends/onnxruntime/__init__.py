"""ONNX decoders on plain onnxruntime, in a child process: no torch and no onnxruntime-genai.

A lack of memory ends a process: the child dies then, and the parent raises EngineError. The parent
never imports onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.engines.child_engine import ChildEngine
from racdeploy.engines.engine import EngineSettings
from racdeploy.errors import ArtifactError
from racdeploy.plugins import require

ACCEL = True


class OnnxRuntimeEngine(ChildEngine):
    """An ONNX file; its graph decides in place of ``cache_dtype`` and ``flash_attention``."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        require("onnxruntime")
        if not path.is_file():
            raise ArtifactError(
                "no-onnx-file", f"{path} is not a file", remedy="give an .onnx file"
            )
        super().__init__(
            "racdeploy.engines.backends.onnxruntime.native", "onnxruntime", path, settings
        )


open_engine = OnnxRuntimeEngine
