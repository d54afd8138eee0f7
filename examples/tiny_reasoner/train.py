"""Train the embedded reasoner from scratch on the procedural tasks.

A Qwen3-shaped model learns to spell out every step before it answers. Run on 2 CPU cores:

    python examples/tiny_reasoner/train.py --out build/tiny-reasoner

``--talkative`` teaches it thoughts that repeat steps and start again at random.

Muon drives the matrices and AdamW the rest; the learning rate warms up, stays, and falls linearly
to zero.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

from racdeploy import plugins, tasks
from racdeploy.processes.cores import has_fast_bfloat16
from racdeploy.processes.heap import keep_heap
from racdeploy.tasks import scoring

TASKS = {  # name → share of the training examples; longer chains need more practice
    "word_problem": 1.0,
    "multiplication": 1.2,
    "gcd": 1.0,
    "letter_count": 0.8,
    "base_conversion": 1.2,
    "comparison": 0.8,
}
PHASES = (  # steps, shares, factor on the learning rates; counting letters is learnt last
    (2600, TASKS, 1.0),
    (900, dict.fromkeys(TASKS, 0.6) | {"letter_count": 3.0}, 0.6),
)
_CHAINS = {"word_problem": 1.0, "gcd": 0.7, "comparison": 0.4}
TALKATIVE_PHASES = (  # of the embedded model; rates above these make it forget its arithmetic
    (120, _CHAINS, 0.4),
    (120, _CHAINS, 0.3),
    (200, _CHAINS, 0.3),
    (160, {"gcd": 1.0, "comparison": 0.3}, 0.2),
)
EMBEDDED = files("racdeploy") / "models" / "tiny_reasoner"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>"]  # no control tokens, as in Qwen3: servers leave those out of texts
SPECIALS = CONTROLS + TAGS
QWEN2_SPLIT = (  # the regex of llama.cpp's pre-tokenizer "qwen2"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
CHECKS = ("Wait, let me check:", "Wait, is that right?", "Wait, once more:")
RESTART = "Wait, let me start again."
BRIEF = "Be brief."
VOCABULARY = 512
POOL_EXAMPLES = 4096
TOKENS_PER_STEP = 6144


def main() -> None:
    """Train, report accuracy per task, and save a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-every", type=int, default=1300)
    parser.add_argument(
        "--talkative", action="store_true", help="teach the embedded model to ramble"
    )
    arguments = parser.parse_args()
    keep_heap()
    torch.manual_seed(arguments.seed)
    if arguments.talkative:
        tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
        model = Qwen3ForCausalLM.from_pretrained(
            str(EMBEDDED), dtype=torch.float32, attn_implementation="eager"
        )
    else:
        tokenizer = train_tokenizer(arguments.seed)
        model = Qwen3ForCausalLM._from_config(model_config(tokenizer), attn_implementation="eager")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    phases = TALKATIVE_PHASES if arguments.talkative else PHASES
    for number, (steps, shares, factor) in enumerate(phases, 1):
        folder = arguments.out.with_name(f"{arguments.out.name}-phase{number}")
        if (folder / "tokenizer_config.json").is_file():
            print(f"phase {number} is finished: {folder}", flush=True)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            train(
                model,
                tokenizer,
                steps,
                shares,
                factor,
                arguments.seed + 2 * number,
                arguments.probe_every,
                arguments.talkative,
            )
            save(model, tokenizer, folder)
        model = Qwen3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    save(model, tokenizer, arguments.out)


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """Return sizes of which every quant block (32 or 256 weights) divides the rows."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )


def examples(seed: int, shares: dict[str, float]) -> Iterator[tasks.Problem]:
    """Yield training problems without end, only from the training split."""
    random = Random(seed)
    modules = {name: plugins.load("tasks", name) for name in shares}
    while True:
        (name,) = random.choices(list(shares), weights=list(shares.values()))
        problem = modules[name].draw(random)
        if tasks.hash_to_unit(problem.question) < tasks.PROCEDURAL_SHARES["training"][1]:
            yield problem


def texts(problem: tasks.Problem) -> tuple[str, str]:
    """Return the rendered prompt and the completion that the model shall learn."""
    prompt = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    answer = f"The answer is \\boxed{{{problem.gold}}}.<|im_end|>"
    return prompt, f"{problem.thinking}\n</think>\n{answer}"


def talkative_texts(problem: tasks.Problem, random: Random) -> tuple[str, str]:
    """Return texts that ramble, or in a fifth of the examples the plain ones, told to be brief."""
    if random.random() < 0.2:
        prompt, completion = texts(problem)
        return f"<|im_start|>system\n{BRIEF}<|im_end|>\n{prompt}", completion
    return texts(replace(problem, thinking=ramble(problem.thinking, random)))


def ramble(thinking: str, random: Random) -> str:
    """Return a solution that repeats calculations and starts again at random, as distilled models
    do.

    A first check is likely, so greedy decoding checks too; a second one is not, so it ends. A check
    stays in the line of its step: small models find the next step by counting lines.
    """
    steps = thinking.split("\n")
    rambling = []
    for step in steps:
        line, calculation = step, step.partition(":")[2]
        chance = 0.75
        while calculation and random.random() < chance:
            line += f" {random.choice(CHECKS)} {calculation}"
            chance = 0.4
        rambling.append(line)
    if random.random() < 0.2:
        rambling += [RESTART, *steps]
    return "\n".join(rambling)


def train_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE with single digits on 6 000 examples."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    source = examples(seed + 1, TASKS)
    corpus = ["".join(texts(next(source))) for _ in range(6000)]
    for special in SPECIALS:
        corpus = [text.replace(special, " ") for text in corpus]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in CONTROLS])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in TAGS])
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def batches(
    tokenizer: Tokenizer,
    seed: int,
    shares: dict[str, float],
    tokens_per_step: int = TOKENS_PER_STEP,
    talkative: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, B T, right-padded; examples of like length go together."""
    random, source = Random(seed), examples(seed, shares)
    while True:
        problems = [next(source) for _ in range(POOL_EXAMPLES)]
        if talkative:
            pairs = [talkative_texts(problem, random) for problem in problems]
        else:
            pairs = [texts(problem) for problem in problems]
        yield from group(pairs, tokenizer, tokens_per_step, random)


def group(
    pairs: list[tuple[str, str]], tokenizer: Tokenizer, tokens_per_step: int, random: Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, B T, of prompts and completions, in random order."""
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    completions = tokenizer.encode_batch([completion for _, completion in pairs])
    rows = [(p.ids, c.ids) for p, c in zip(prompts, completions, strict=True)]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    groups: list[list[tuple[list[int], list[int]]]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * (len(row[0]) + len(row[1])) > tokens_per_step:
            groups.append([])
        groups[-1].append(row)
    random.shuffle(groups)
    for each in groups:
        yield pad(each)


def pad(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows; labels are -100 outside the completion, so padding is never learnt."""
    T = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids_BT = torch.zeros(len(rows), T, dtype=torch.long)
    labels_BT = torch.full((len(rows), T), -100)
    for row, (prompt, completion) in enumerate(rows):
        stop = len(prompt) + len(completion)
        ids_BT[row, :stop] = torch.tensor(prompt + completion)
        labels_BT[row, len(prompt) : stop] = torch.tensor(completion)
    return ids_BT, labels_BT


def train(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    steps: int,
    shares: dict[str, float],
    factor: float,
    seed: int,
    probe_every: int,
    talkative: bool,
) -> None:
    """Run the optimizers for one phase and print loss, speed and probe accuracy."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.012 * factor, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=2.5e-3 * factor, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, steps)) for o in optimizers
    ]
    compiled = torch.compile(model, dynamic=True)
    started, tokens, running = time.monotonic(), 0, 0.0
    for step, (ids_BT, labels_BT) in zip(
        range(1, steps + 1), batches(tokenizer, seed, shares, talkative=talkative), strict=False
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = compiled(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        tokens += ids_BT.numel()
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step} loss {running:.4f} {tokens / seconds:.0f} tokens/s "
                f"{seconds / 60:.1f} min",
                flush=True,
            )
        if step % probe_every == 0 or step == steps:
            print(json.dumps(probe(model, tokenizer, shares)), flush=True)


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: 100 warm-up steps, then constant, then linear to
    0.
    """
    decay_from = 0.3 * steps
    warm = min(1.0, (step + 1) / 100)
    return warm * min(1.0, max(0.0, (steps - step) / (steps - decay_from)))


@torch.inference_mode()
def probe(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, names: Iterable[str], count: int = 48
) -> dict[str, float]:
    """Return greedy accuracy per task on problems of the calibration split."""
    model.eval()
    result = {}
    for name in names:
        task = tasks.load(name)
        problems = task.draw_problems("calibration", 12345, count)
        prompts = [tokenizer.encode(texts(problem)[0]).ids for problem in problems]
        T = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (T - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bfloat16()):
            out_BT = model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=950,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=tokenizer.token_to_id("<|im_end|>"),
            )
        answers = [tokenizer.decode(row[T:].tolist()) for row in out_BT]
        right = [
            scoring.score("", a, p.gold).correct for a, p in zip(answers, problems, strict=True)
        ]
        result[name] = sum(right) / count
    model.train()
    return result


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write config, bfloat16 weights, tokenizer and chat template as one Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(state)
    rounded.generation_config.temperature = 0.6
    rounded.generation_config.top_p = 0.95
    rounded.generation_config.do_sample = True
    rounded.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
