"""Decoder graphs of the two exporters that the world uses, straight from them.

``genai`` is onnxruntime-genai's model builder: GroupQueryAttention, past and present in one buffer,
the head size left open in the graph. ``optimum`` is optimum-onnx: plain operators that append to
the past. One child process makes both of them once for a whole test run.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.support.tiny_models import make_checkpoint

EXPORTERS = ("genai", "optimum")
_SCRIPT = """
import runpy, sys
from optimum.exporters.onnx import main_export
source, folder = sys.argv[1:]
task = "text-generation-with-past"
main_export(source, folder + "/optimum", task=task, dtype="fp32", do_validation=False)
sys.argv = ["builder", "-i", source, "-o", folder + "/genai", "-p", "fp32", "-e", "cpu"]
sys.argv += ["-c", folder + "/cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


@cache
def tiny_onnx() -> Path:
    """Return a folder with ``checkpoint``, and ``model.onnx`` in ``genai`` and ``optimum``."""
    folder = Path(tempfile.mkdtemp(prefix="racdeploy-onnx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen3")
    child = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(checkpoint), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert all((folder / name / "model.onnx").is_file() for name in EXPORTERS), child.stderr[-3000:]
    return folder
