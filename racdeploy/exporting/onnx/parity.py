"""Compare a float32 graph on plain onnxruntime with transformers under torch: MODEL_FOLDER GRAPH.

Prints the differences as one JSON object: those of logits in ``prefill``, of all tokens at once,
and in ``decode``, of single tokens on the graph's own cache, as largest difference over largest
absolute value; and in ``rotary`` the absolute one of rotary tables, if the graph has them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from racdeploy.engines.backends.onnxruntime.graph import DecoderGraph, open_session
from racdeploy.engines.backends.onnxruntime.native import AppendedCache
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting.onnx.graph import ROTARY_TABLES
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.file import read_array
from racdeploy.quant.grid import Floats

_PREFILL, _DECODE = 24, 8


def main() -> None:
    """Compare one graph."""
    checkpoint = Checkpoint(Path(sys.argv[1]))
    file = Path(sys.argv[2])
    V = checkpoint.shape.vocab_size
    ids = np.random.default_rng(0).integers(0, V, _PREFILL + _DECODE)

    expected_TV, rotary = _run_torch(checkpoint, ids, file)
    prefill_TV, decode_TV = _run_graph(checkpoint, ids, file)
    differences = {
        "prefill": _compare(expected_TV[:_PREFILL], prefill_TV),
        "decode": _compare(expected_TV[_PREFILL:], decode_TV),
    }
    print(json.dumps(differences | rotary))


@torch.no_grad()
def _run_torch(checkpoint: Checkpoint, ids: NDArray[np.int64], file: Path) -> tuple[Floats, Any]:
    model = load_model(checkpoint)
    logits_TV = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()

    graph = onnx.load(str(file), load_external_data=False).graph
    tables = {tensor.name: tensor for tensor in graph.initializer}
    if "cos_cache" not in tables:
        return logits_TV, {}

    # The logits above use only the first rows of precomputed tables.
    actual = [read_array(tables[name], file.parent) for name in ROTARY_TABLES]
    T, K = actual[0].shape
    rotary = model.get_submodule("model.rotary_emb")
    expected = rotary(torch.zeros(1), torch.arange(T)[None])

    differences = []
    for table_BTK, actual_TK in zip(expected, actual, strict=True):
        expected_TK = table_BTK[0, :, :K].float().numpy()
        differences.append(float(np.abs(expected_TK - actual_TK).max()))

    return logits_TV, {"rotary": max(differences)}


def _run_graph(checkpoint: Checkpoint, ids: NDArray[np.int64], file: Path) -> tuple[Floats, Floats]:
    onnxruntime.set_default_logger_severity(3)
    session = open_session(file, onnxruntime.SessionOptions())
    cache = AppendedCache(DecoderGraph(session, checkpoint.folder), 1, len(ids))

    # All tokens of the prefill at once, then one at a time on the graph's own cache.
    chunks = (ids[:_PREFILL], *ids[_PREFILL:, None])
    prefill_TV, *others = [cache.feed(0, chunk.tolist(), last=False) for chunk in chunks]
    return prefill_TV, np.concatenate(others)


def _compare(expected_TV: Floats, actual_TV: Floats) -> float:
    largest = np.abs(expected_TV).max()
    return float(np.abs(expected_TV - actual_TV).max() / largest)


if __name__ == "__main__":
    main()
