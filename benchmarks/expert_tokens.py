"""How many tokens an expert needs: its own statistic against that of all tokens of its block.

Experts of the embedded reasoner, as if its middle feed-forward part were eight experts that are
alike, each token sent to two of them by the nearest of eight directions. One linear of each is
pruned to 50 % zeros on so many tokens of its own, and on all that there are. What is printed is the
ratio of the errors on its own tokens, some kept aside.

    python -m benchmarks.expert_tokens
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import torch

from racdeploy import plugins
from racdeploy.engines.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import read_tokenizer
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import Unstructured
from racdeploy.prune.refit import prune_and_refit
from racdeploy.recipe import Pruning

MODEL = Path(__file__).parents[1] / "racdeploy" / "models" / "tiny_reasoner"
TASKS = ("gcd", "word_problem", "multiplication", "base_conversion", "comparison", "letter_count")
EXPERTS, CHOSEN, MEASURED = 8, 2, 3
TOKENS = (64, 128, 256, 512, 1024, 2048)
SETTINGS = Pruning(sparsity=0.5)


def gather(checkpoint: Checkpoint, problems: int) -> dict[str, torch.Tensor]:
    """Return what reaches the linears of the middle feed-forward part, for worked solutions."""
    model = load_model(checkpoint)
    tokenizer = read_tokenizer(checkpoint.tokenizer.file)
    part = model.get_submodule(f"model.layers.{checkpoint.block_count // 2}.mlp")
    seen: dict[str, list[torch.Tensor]] = {"gate_proj": [], "down_proj": []}
    for name, inputs in seen.items():
        part.get_submodule(name).register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0][0])
        )

    generator = random.Random(0)
    for number in range(problems):
        problem = plugins.load("tasks", TASKS[number % len(TASKS)]).draw(generator)
        text = f"{problem.question}\n<think>\n{problem.thinking}\n</think>\n{problem.gold}"
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(tokenizer.encode(text))[:400]]))

    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def route(hidden_ND: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the experts of each token: those whose directions are nearest."""
    centred_ND = hidden_ND - hidden_ND.mean(0)
    directions_ED = centred_ND[torch.randperm(len(hidden_ND), generator=generator)[:EXPERTS]]
    logits_NE = centred_ND @ directions_ED.T / directions_ED.norm(dim=1)
    chosen_NK: torch.Tensor = logits_NE.topk(CHOSEN, 1).indices
    return chosen_NK


def prune(weight_OI: torch.Tensor, input_NI: torch.Tensor) -> torch.Tensor:
    """Return the weights with zeros chosen on some inputs."""
    hessian = Hessian(input_NI.T @ input_NI / len(input_NI), SETTINGS.damping)
    method = plugins.load("methods", SETTINGS.method)
    live_OI = weight_OI * ~hessian.dead_I
    return prune_and_refit(method, live_OI, hessian, Unstructured(0.5), SETTINGS).weight_OI


def main() -> None:
    """Print one line for each linear and number of tokens."""
    checkpoint = Checkpoint(MODEL)
    inputs, generator = gather(checkpoint, 400), torch.Generator().manual_seed(0)
    chosen_NK = route(inputs["gate_proj"], generator)
    fitted = round(0.8 * len(chosen_NK))

    for name, input_NI in inputs.items():
        weight = f"model.layers.{checkpoint.block_count // 2}.mlp.{name}.weight"
        weight_OI = torch.from_numpy(checkpoint.read(weight))
        pooled_OI = prune(weight_OI, input_NI[:fitted])

        for count in TOKENS:
            ratios = []
            for expert in range(MEASURED):
                token_M = (chosen_NK == expert).any(1).nonzero()[:, 0]
                own_M, other_M = token_M[token_M < fitted], token_M[token_M >= fitted]
                drawn_M = own_M[torch.randperm(len(own_M), generator=generator)[:count]]
                own_OI = prune(weight_OI, input_NI[drawn_M])
                errors = []
                for found_OI in (own_OI, pooled_OI):
                    lost_NO = input_NI[other_M] @ (found_OI - weight_OI).T
                    errors.append(float(lost_NO.square().sum()))
                ratios.append(errors[0] / errors[1])

            row = {"linear": name, "inputs": input_NI.shape[1], "tokens": count}
            print(json.dumps({**row, "own_over_pooled": statistics.median(ratios)}), flush=True)


if __name__ == "__main__":
    main()
