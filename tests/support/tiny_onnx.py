"""Decoder graphs of two kinds, straight from the exporters that write them.

``genai`` is onnxruntime-genai's model builder: GroupQueryAttention, past and present in one buffer,
the head size left open in the graph. The other one appends to the past: optimum-onnx's, or torch's
where transformers is too new for optimum. One child process makes both once for a whole test run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from racdeploy.extras import installed_release, is_installed
from tests.support.shared import build_once
from tests.support.tiny_models import make_checkpoint

HAS_OPTIMUM = is_installed("optimum")
needs_optimum = pytest.mark.skipif(
    not HAS_OPTIMUM, reason="optimum-onnx needs transformers below 4.58: make test-optimum"
)
TRACES_STATES = installed_release("transformers") >= (5, 24)
"""Whether torch's export takes Qwen3.5, Granite 4 and Nemotron-H."""
APPENDING = "optimum" if HAS_OPTIMUM else "torch"
"""The exporter whose graph appends."""
EXPORTERS = ("genai", APPENDING)
_SCRIPTS = {
    "optimum": """
from optimum.exporters.onnx import main_export
task = "text-generation-with-past"
main_export(source, folder + "/optimum", task=task, dtype="fp32", do_validation=False)
""",
    "torch": """
sys.argv = ["child", source, folder + "/torch"]
runpy.run_module("racdeploy.exporting.onnx.exporters.torch.child", run_name="__main__")
""",
    "genai": """
sys.argv = ["builder", "-i", source, "-o", folder + "/genai", "-p", "fp32", "-e", "cpu"]
sys.argv += ["-c", folder + "/cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
""",
}


@cache
def tiny_onnx() -> Path:
    """Return a folder with ``checkpoint``, and ``model.onnx`` in a folder of each exporter."""
    return build_once("tiny-onnx", _export)


def _export(folder: Path) -> None:
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen3")

    # The builder comes last: it puts a folder of its own in front of all imports.
    steps = [_SCRIPTS[name] for name in reversed(EXPORTERS)]
    script = "\n".join(["import runpy, sys", "source, folder = sys.argv[1:]", *steps])
    child = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert all((folder / name / "model.onnx").is_file() for name in EXPORTERS), child.stderr[-3000:]
