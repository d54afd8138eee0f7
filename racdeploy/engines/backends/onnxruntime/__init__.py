"""ONNX decoders on onnxruntime in a child process, without torch and onnxruntime-genai.

A lack of memory kills the child, and the parent raises EngineError. The parent never imports
onnxruntime.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.engines.engine import EngineSettings
from racdeploy.engines.subprocess_engine import SubprocessEngine
from racdeploy.errors import ArtifactError
from racdeploy.packing.onnx.data_files import find_data_files
from racdeploy.plugins import require_package
from racdeploy.sparse_kernels import accel_name

ACCEL = True


class OnnxRuntimeEngine(SubprocessEngine):
    """An ONNX file; its graph overrides ``cache_dtype`` and ``flash_attention``."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        require_package("onnxruntime")
        # onnxruntime reads its own format where the name ends in .ort.
        if not path.is_file() or path.suffix != ".onnx":
            raise ArtifactError(
                "no-onnx-file", f"{path} is not an .onnx file", remedy="give an .onnx file"
            )
        super().__init__(
            "racdeploy.engines.backends.onnxruntime.native", "onnxruntime", path, settings
        )


def find_parts(path: Path) -> set[str]:
    """Return the locations of the external data of a graph, and of its graph for kernels."""
    accel = path.with_name(accel_name(path.name))
    return find_data_files(path) | (find_data_files(accel) if accel.is_file() else set())


open_engine = OnnxRuntimeEngine
