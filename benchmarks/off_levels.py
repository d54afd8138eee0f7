"""Move a published model off the levels of the number format that it was once stored in.

    python -m benchmarks.off_levels MODEL OUT

A model that comes from a quantized file lies on that format's levels, so that the same format as a
candidate looks better than it is. Hidden channels are scaled at random and back, which changes no
output. The embedding stays on its levels.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

MAX_FACTOR = 0.35  # of the random scales, in nats
TOLERANCE = 1e-5  # of the largest logit, in float32
_OFFSET_NORMS = ("gemma3_text", "gemma3")
"""Families whose norms multiply by 1 + weight."""


def load(folder: Path) -> Any:
    """Return a model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def scale_channels(model: Any) -> None:
    """Scale every hidden channel of Llama-like or Gemma-like blocks at random, and back."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int) -> torch.Tensor:
        return torch.exp((2 * torch.rand(channels, generator=generator) - 1) * MAX_FACTOR)

    config = model.config
    offset = float(config.model_type in _OFFSET_NORMS)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        before_mlp = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        inputs = (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (before_mlp, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in inputs:
            factor_D = draw(config.hidden_size)
            norm.weight.copy_((norm.weight + offset) / factor_D - offset)
            for linear in linears:
                linear.weight *= factor_D

        factor_F = draw(config.intermediate_size)
        mlp.up_proj.weight /= factor_F[:, None]
        mlp.down_proj.weight *= factor_F

        # Heads of queries share those of values.
        factor_V = draw(len(attention.v_proj.weight))
        attention.v_proj.weight /= factor_V[:, None]
        heads = factor_V.view(config.num_key_value_heads, 1, -1)
        shared = config.num_attention_heads // config.num_key_value_heads
        attention.o_proj.weight *= heads.expand(-1, shared, -1).reshape(-1)


@torch.no_grad()
def main() -> None:
    """Write the scaled model, and print how far its logits are from those before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    model = load(arguments.model)
    ids = torch.randint(
        model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(1)
    )
    before = model(ids).logits
    scale_channels(model)
    distance = ((model(ids).logits - before).abs().max() / before.abs().max()).item()
    assert distance <= TOLERANCE, distance

    shutil.copytree(arguments.model, arguments.out, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(arguments.out)
    print(f"logits differ by {distance:.1e} of the largest")


if __name__ == "__main__":
    main()
