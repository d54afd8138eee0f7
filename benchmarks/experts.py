"""Which experts go: the block's output against the router-weighted norm of REAP, on random models.

Of each model of eight experts, two a token, a share stays in every block; nothing else is pruned.
What is printed is the mean KL divergence from the whole model, on traces that decided nothing.
Experts differ in size.

    python -m benchmarks.experts --out build/experts
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Structure
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

EXPERTS = 8
SPREAD = 1.0  # standard deviation of the logarithm of an expert's size
CALIBRATION = [make_trace(i, 5 + i % 7, 30, 4) for i in range(64)]
HELD_OUT = [make_trace(100 + i, 6, 30, 4) for i in range(16)]


def make_model(folder: Path, seed: int) -> Checkpoint:
    """Write a model whose experts are of different sizes, as trained ones are."""
    make_checkpoint(folder, "qwen3_moe", dtype="float32", seed=seed, num_experts=EXPERTS)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")

    for name in sorted(weights):
        if name.endswith("down_proj.weight"):
            weights[name] *= torch.exp(SPREAD * torch.randn((), generator=generator))

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def measure(checkpoint: Checkpoint, out: Path, criterion: str, share: float) -> float:
    """Return the mean KL divergence from the dense model where a share of the experts stays."""
    blocks = out / "blocks"
    blocks.mkdir(parents=True)
    structure = Structure.model_validate({"keep": {"experts": share}, "criterion": criterion})
    plain = Pruning(sparsity=0.0, target="linear_output", ignore=("proj",))
    prune_blocks(checkpoint, CALIBRATION, [], plain, blocks, structure=structure)

    shape = read_cut_plan(blocks).shape(checkpoint.shape, structure)
    cut = Checkpoint(assemble(checkpoint, blocks, out / "model", shape))
    models = [load_model(each) for each in (checkpoint, cut)]

    total, tokens = 0.0, 0
    for trace in HELD_OUT:
        with torch.inference_mode():
            logits = [model(input_ids=torch.tensor([trace.ids])).logits[0] for model in models]
        dense_TV, cut_TV = (each.double().log_softmax(-1) for each in logits)
        total += float((dense_TV.exp() * (dense_TV - cut_TV)).sum())
        tokens += len(trace.ids)

    return total / tokens


def main() -> None:
    """Print one line for each share of experts that stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/experts"))
    parser.add_argument("--models", type=int, default=10)
    options = parser.parse_args()

    for share in (0.75, 0.5):
        found: dict[str, list[float]] = {"error": [], "magnitude": []}
        for seed in range(options.models):
            folder = options.out / f"{share}-{seed}"
            checkpoint = make_model(folder / "model", seed)
            for criterion, divergences in found.items():
                divergences.append(measure(checkpoint, folder / criterion, criterion, share))

        pairs = zip(found["error"], found["magnitude"], strict=True)
        row: dict[str, object] = {"share": share}
        for criterion, divergences in found.items():
            row[criterion] = sum(divergences) / len(divergences)
        row["error_is_lower_in"] = sum(own < other for own, other in pairs)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
