"""The tiny model with zeros, and one graph for every export of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from racdeploy.export.onnx import exporters as onnx_exporters
from racdeploy.export.onnx import writer as onnx_writer
from racdeploy.export.onnx.choice import Chosen
from racdeploy.export.onnx.graph import adopt
from racdeploy.models.checkpoint import Checkpoint
from tests.support.tiny_onnx import APPENDING, tiny_onnx


def sparse_checkpoint(folder: Path, sparsity: float = 0.5) -> Checkpoint:
    """Write the tiny model with that share of every linear, the smallest weights, set to zero."""
    shutil.copytree(tiny_onnx() / "checkpoint", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj.weight" in name:
            weight[weight.abs() < weight.abs().float().quantile(sparsity)] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def use_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every export take one graph of the tiny model, whose weights it replaces."""
    dense = Checkpoint(tiny_onnx() / "checkpoint")
    file = tiny_onnx() / APPENDING / "model.onnx"
    graph = adopt(file, dense, onnx_exporters.load(APPENDING))
    monkeypatch.setattr(
        onnx_writer, "choose", lambda checkpoint, exporter: Chosen(graph, "built once")
    )
