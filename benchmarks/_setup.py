"""What several benchmarks need: settings of a recipe, a pruned model, random weights."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy.files.caches import default_work_folder
from racdeploy.files.toml import merge
from racdeploy.models import widths
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.tensors.safetensors import write_header

Trace = tuple[tuple[int, ...], tuple[int, ...]]
QWEN2_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--set KEY=VALUE``, which changes single settings of a recipe."""
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe: KEY of [prune], or PART.KEY",
    )


def with_settings(options: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    """Return a recipe's values with KEY=VALUE over them.

    VALUE is TOML, or plain text; a KEY without a dot is of [prune].
    """
    for pair in pairs:
        name, chosen = pair.split("=", 1)
        try:
            nested: Any = tomllib.loads(f"value = {chosen}")["value"]
        except tomllib.TOMLDecodeError:
            nested = chosen
        path = name if "." in name else f"prune.{name}"
        for part in reversed(path.split(".")):
            nested = {part: nested}
        options = merge(options, nested)

    return options


def pruning_parser(about: str) -> argparse.ArgumentParser:
    """Return a parser of what :func:`prune` takes."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--model", default="tiny-reasoner")
    made.add_argument("--task", default="", help="jsonl:FILE; default: the procedural tasks")
    made.add_argument("--sparsity", type=float, default=0.5)
    made.add_argument("--traces", type=int, default=256)
    made.add_argument("--max-new-tokens", type=int, default=1024)
    made.add_argument("--compared", type=int, default=16, help="held-out traces for the KL")
    made.add_argument("--work", type=Path, default=default_work_folder())
    made.add_argument("--threads", type=int, default=0)
    made.add_argument("--out", type=Path, required=True)
    return made


def prune(arguments: argparse.Namespace) -> tuple[Build, Path, list[Trace]]:
    """Return the build, the folder of the pruned model, and prompt and completion ids of held-out
    traces of the dense model.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": arguments.model,
        "tasks": (arguments.task,) if arguments.task else (),
        "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
        "calibration": {"keep_truncated": arguments.model != "tiny-reasoner"},
        "prune": {"sparsity": arguments.sparsity},
    }
    recipe = Recipe.combine(None, nest_settings(settings))
    build = Build(Job(recipe), arguments.work, arguments.threads)
    held_out = build.prune_stage.choose_traces(build.traces()[1]).held_out
    traces = [(trace.prompt_ids, trace.completion_ids) for trace in held_out[: arguments.compared]]
    return build, build.prune().folder, traces


def write_random_model(
    folder: Path, channels: Sequence[int], shape: Mapping[str, int] = QWEN2_1_5B
) -> None:
    """Write a Qwen2 of random bfloat16 weights, one tensor in memory at a time.

    ``channels`` are those of each block's feed-forward part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: ("BF16", size) for name, size in _list_tensors(channels, shape)}
    random = np.random.default_rng(1)

    with (folder / "model.safetensors").open("wb") as file:
        write_header(file, described)
        for name, (_, size) in described.items():
            values = np.ones(size, np.float32)
            if "norm" not in name:
                values = random.standard_normal(size, np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())

    config = dict(shape) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": len(channels),
        "intermediate_size": max(channels),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    if len({*channels}) > 1:
        config = widths.cut_config(config, range(len(channels)), {"intermediate_size": channels})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _list_tensors(
    channels: Sequence[int], shape: Mapping[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = shape["hidden_size"]
    width = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)

    for block, inner in enumerate(channels):
        prefix = f"model.layers.{block}"
        for name, outputs in (("q", hidden), ("k", width), ("v", width)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (outputs, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (outputs,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)

    yield "model.norm.weight", (hidden,)
