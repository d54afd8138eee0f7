"""The tiny model with zeros, and one graph for every export of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph
from racdeploy.exporting.onnx.graph import strip_weights
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
    graph = strip_weights(file, dense)
    monkeypatch.setattr(
        onnx_writer,
        "export_verified_graph",
        lambda checkpoint, exporter: VerifiedGraph(graph, "built once"),
    )
