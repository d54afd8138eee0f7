"""The embedded reasoner as files that tests compare, made once for a test run."""

from __future__ import annotations

import shutil
from pathlib import Path

from racdeploy import exporting
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import resolve_model
from racdeploy.recipe import Export
from tests.support.shared import build_once

SOURCE = Path(resolve_model("tiny-reasoner").folder)


def reasoner_gguf(quant: str) -> Path:
    """Return its GGUF file; who changes it works on a copy."""

    def build(folder: Path) -> None:
        exporting.write(Checkpoint(SOURCE), folder / f"{quant}.gguf", Export(quant=quant))

    return build_once(f"reasoner-{quant}", build) / f"{quant}.gguf"


def reasoner_onnx() -> Path:
    """Return a folder with its graph in float32, its tokenizer and its configuration."""

    def build(folder: Path) -> None:
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(SOURCE, folder, ignore=ignored, dirs_exist_ok=True)
        settings = Export(format="onnx", quant="f32")
        exporting.write(Checkpoint(SOURCE), folder / "model.onnx", settings)

    return build_once("reasoner-onnx", build)
