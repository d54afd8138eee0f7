"""Is transformers' own ONNX exporter, of its release 5.24, as good as the one of this package?

A Qwen3 with random weights: seconds of the export, nodes, distance of the logits from torch, and
ms per token after 512 tokens on one thread, both graphs in turns.

    python -m benchmarks.transformers_exporter --out build/exporters
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from racdeploy.engines.backends.onnxruntime.graph import DecoderGraph, open_session
from racdeploy.engines.backends.onnxruntime.native import AppendedCache
from racdeploy.exporting.onnx import exporters
from racdeploy.models.checkpoint import Checkpoint
from tests.support.tiny_models import make_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
PREFILL, TOKENS, ROUNDS = 512, 32, 5
THEIRS = """
import sys, onnx_ir, torch
from pathlib import Path
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
model = load_model(Checkpoint(Path(sys.argv[1])))
ids = torch.zeros(2, 8, dtype=torch.int64)
with torch.no_grad():
    past = model(input_ids=ids[:, :5], use_cache=True)
inputs = {
    "input_ids": ids[:, 5:],
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(5, 8).repeat(2, 1),
    "past_key_values": past.past_key_values,
}
program = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, opset_version=23)).program
NAMES = {"cache.layers": "present", ".layers": "", ".keys": ".key", ".values": ".value"}
for value in (*program.graph.inputs, *program.graph.outputs):
    for old, new in NAMES.items():
        value.name = value.name.replace(old, new)
    # Fixed sizes of inputs are written as names that read as numbers.
    sizes = [str(getattr(size, "value", size)) for size in value.shape]
    value.shape = onnx_ir.Shape([int(size) if size.isdigit() else size for size in sizes])
Path(sys.argv[2]).mkdir()
onnx_ir.save(program, sys.argv[2] + "/model.onnx", external_data="model.onnx_data")
"""


def main() -> None:
    """Export twice and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    checkpoint = Checkpoint(make_checkpoint(out / "model", "qwen3", **SIZES))
    prepared = exporters.prepare(checkpoint, out / "prepared")
    folders = {"own": out / "own", "transformers'": out / "theirs"}
    for name, folder in folders.items():
        start = time.monotonic()
        if name == "own":
            exporters.load("torch").build(prepared, folder)
        else:
            subprocess.run([sys.executable, "-c", THEIRS, str(prepared), str(folder)], check=True)
        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        parity = subprocess.run(
            [
                sys.executable,
                "-m",
                "racdeploy.exporting.onnx.parity",
                prepared,
                folder / "model.onnx",
            ],
            stdout=subprocess.PIPE,
            check=True,
        )
        found: dict[str, Any] = json.loads(parity.stdout)
        seconds = time.monotonic() - start
        print(f"{name}: {seconds:.0f} s with parity, {len(graph.node)} nodes, {found}", flush=True)

    ids = np.random.default_rng(0).integers(0, 480, PREFILL + TOKENS).tolist()
    times: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(ROUNDS):
        for name, folder in folders.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            graph = DecoderGraph(open_session(folder / "model.onnx", options), prepared)
            cache = AppendedCache(graph, 1, len(ids))
            cache.feed(0, ids[:PREFILL], last=True)
            start = time.perf_counter()
            for token in ids[PREFILL:]:
                cache.feed(0, [token], last=True)
            times[name].append((time.perf_counter() - start) / TOKENS * 1e3)

    for name, found_ms in times.items():
        print(f"{name}: {statistics.median(found_ms):.2f} ms per token")
    own, theirs = times.values()
    ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    print(f"transformers' takes {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
