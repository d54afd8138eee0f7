"""Compare a float32 graph on plain onnxruntime with transformers under torch: MODEL_FOLDER GRAPH.

Prints one JSON object of relative differences, largest absolute difference over largest absolute value: ``prefill`` of
all tokens at once, ``decode`` of further tokens one by one on the graph's own cache, and ``rotary`` of every row of a
rotary table, where the graph holds one. torch is done before onnxruntime begins, so only one model is in memory.
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

from racdeploy.engines.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.file import read_array

_PREFILL, _DECODE = 24, 8


def main() -> None:
    """Compare one graph."""
    checkpoint, file = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2])
    ids = np.random.default_rng(0).integers(0, checkpoint.integer("vocab_size"), _PREFILL + _DECODE)
    expected_TV, rotary = _run_torch(checkpoint, ids, file)
    prefill_TV, decode_TV = _run_graph(checkpoint, ids, file)
    found = {
        "prefill": _difference(expected_TV[:_PREFILL], prefill_TV),
        "decode": _difference(expected_TV[_PREFILL:], decode_TV),
    }
    print(json.dumps(found | rotary))


@torch.no_grad()
def _run_torch(
    checkpoint: Checkpoint, ids: NDArray[np.int64], file: Path
) -> tuple[NDArray[np.float32], Any]:
    model = load_model(checkpoint)
    logits_TV = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    tables = {t.name: t for t in onnx.load(str(file), load_external_data=False).graph.initializer}
    if "cos_cache" not in tables:
        return logits_TV, {}
    cos_TK, sin_TK = (read_array(tables[name], file.parent) for name in ("cos_cache", "sin_cache"))
    T, K = cos_TK.shape
    positions = torch.arange(T)[None]
    wide = model.get_submodule("model.rotary_emb")(torch.zeros(1), positions)
    pairs = zip(wide, (cos_TK, sin_TK), strict=True)
    worst = max(
        float(np.abs(table[0, :, :K].float().numpy() - found).max()) for table, found in pairs
    )
    return logits_TV, {"rotary": worst}


def _run_graph(
    checkpoint: Checkpoint, ids: NDArray[np.int64], file: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    shape = (1, checkpoint.key_value_heads, 0, checkpoint.head_size)
    wanted = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    cache = {
        name: np.zeros(shape, np.float32) for name in wanted if name.startswith("past_key_values.")
    }
    rows, past = [], 0
    for chunk in (ids[:_PREFILL], *ids[_PREFILL:, None]):
        total = past + len(chunk)
        offered = {
            "input_ids": chunk[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        inputs = {name: offered[name] for name in wanted if name in offered}
        found = dict(zip(outputs, session.run(None, inputs | cache), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        rows.append(found["logits"][0])
        past = total
    return rows[0], np.concatenate(rows[1:])


def _difference(expected_TV: NDArray[np.float32], found_TV: NDArray[np.float32]) -> float:
    return float(np.abs(expected_TV - found_TV).max() / np.abs(expected_TV).max())


if __name__ == "__main__":
    main()
