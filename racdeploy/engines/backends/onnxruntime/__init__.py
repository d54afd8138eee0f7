"""ONNX decoders on onnxruntime in a child process, without torch and onnxruntime-genai.

A lack of memory kills the child, and the parent raises EngineError. The parent never imports
onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.engines.engine import EngineSettings
from racdeploy.engines.subprocess_engine import SubprocessEngine
from racdeploy.errors import ArtifactError
from racdeploy.plugins import require_package

ACCEL = True


class OnnxRuntimeEngine(SubprocessEngine):
    """An ONNX file; its graph overrides ``cache_dtype`` and ``flash_attention``."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        require_package("onnxruntime")
        if not path.is_file():
            raise ArtifactError(
                "no-onnx-file", f"{path} is not a file", remedy="give an .onnx file"
            )
        super().__init__(
            "racdeploy.engines.backends.onnxruntime.native", "onnxruntime", path, settings
        )


open_engine = OnnxRuntimeEngine
