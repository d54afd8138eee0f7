"""Quantize the linears of a model with Intel AutoRound, by the Python that it is installed in.

    PYTHON benchmarks/_autoround.py '{"model": …, "quant": "q4_k", "rows": …, "folder": …, …}'

AutoRound's own GGUF export needs a gguf newer than PyPI's, so the dequantized weights are written,
in float32, as safetensors. Its schemes are those of its GGUF formats; all other settings are its
defaults, which are 200 steps of signed gradient descent a block. Knows nothing of racdeploy.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.export.formats.backends import gguf as gguf_backend
from auto_round.schemes import GGUF_SCHEME_FACTS, QuantizationScheme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(job: dict[str, Any]) -> None:
    """Quantize a model and write its linears."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    # Its mix of formats needs the newer gguf, too; here one format for all linears is compared.
    gguf_backend.get_layer_config_by_gguf_format = lambda config, *_: (config, {})

    rows_RT = torch.tensor(json.loads(Path(job["rows"]).read_text()))
    R, T = rows_RT.shape

    rounding = AutoRound(
        model,
        tokenizer,
        scheme=QuantizationScheme(**GGUF_SCHEME_FACTS[f"gguf:{job['quant']}"]),
        dataset=[{"input_ids": row_T[None]} for row_T in rows_RT],
        nsamples=R,
        seqlen=T,
        iters=job["iterations"],
        seed=job["seed"],
    )
    quantized, _ = rounding.quantize()

    weights = {}
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weights[f"{name}.weight"] = module.weight.detach().float().contiguous()
    save_file(weights, Path(job["folder"]) / "block-autoround.safetensors")


if __name__ == "__main__":
    began = sum(os.times()[:4])  # imports do not count
    main(json.loads(sys.argv[1]))
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps({"cpu_s": sum(os.times()[:4]) - began, "peak_bytes": 1024 * int(peak[1])}))
