"""How much memory and time does pruning take as a model gets deeper? Measured on random weights.

    python -m benchmarks.any_size --out build/any-size --blocks 14 28 --tokens 32768

Writes a Qwen2-shaped bfloat16 checkpoint of the wanted depth (28 blocks are 1.5B parameters),
prunes it in a process of its own, and prints seconds, peak resident memory, and what was expected:
memory from the shapes, as ``--dry-run`` says it, and seconds after the first block. Nothing is said
about accuracy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from benchmarks._settings import add_settings, with_settings

if TYPE_CHECKING:
    from racdeploy.traces.trace import Trace

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
TRACE_TOKENS, PROMPT_TOKENS = 1024, 128
T = TypeVar("T")


def main() -> None:
    """Prune every depth in turn and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[14, 28])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    add_settings(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = with_settings({"prune": {"sparsity": 0.5}}, arguments.set)["prune"]
    rows = []

    for blocks in arguments.blocks:
        folder = arguments.out / f"random-{blocks}"
        work = (folder, arguments.tokens, arguments.threads, settings)

        # Each in a process of its own: the peak is that of a process.
        context = multiprocessing.get_context("spawn")
        with context.Pool(1, maxtasksperchild=1) as pool:
            if not (folder / "config.json").is_file():
                pool.apply(write_model, (folder, blocks))
            predicted = pool.apply(predict, (folder, arguments.tokens, settings))
            found = pool.apply(prune, work)

        row = {"blocks": blocks, "tokens": arguments.tokens, "predicted_peak_bytes": predicted}
        rows.append(row | found)
        print(
            f"{blocks} blocks: {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of the "
            f"processor, peak {found['peak_bytes'] / 2**30:.2f} GiB; expected "
            f"{found['expected_seconds']:.0f} s after the first block, {predicted / 2**30:.2f} GiB",
            flush=True,
        )

    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def predict(folder: Path, tokens: int, settings: Mapping[str, object]) -> int:
    """Return the peak bytes that ``--dry-run`` predicts."""
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.prune.cost import peak_bytes
    from racdeploy.recipe import Pruning

    calibration = lengths(tokens)
    counts = sum(calibration), sum(held_out(calibration))
    return peak_bytes(Checkpoint(folder), Pruning.model_validate(settings), *counts)


def prune(
    folder: Path, tokens: int, threads: int, settings: Mapping[str, object]
) -> dict[str, float]:
    """Prune one checkpoint in this process; return seconds, processor seconds, and peak resident
    bytes.
    """
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.prune.calibrate import prune_blocks
    from racdeploy.prune.cost import TimeLeft
    from racdeploy.recipe import Pruning

    checkpoint, traces = Checkpoint(folder), random_traces(folder, tokens)

    def show(label: str, done: int, total: int, tokens: int = 0) -> None:
        estimate.update(label, done, total)
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = time.perf_counter() - began
        print(
            f"  {label} {done}/{total}: {seconds:.0f} s, {peak_kib / 2**20:.2f} GiB",
            file=sys.stderr,
        )

    began, cpu_began, estimate = time.perf_counter(), time.process_time(), TimeLeft()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        prune_blocks(
            checkpoint,
            traces,
            held_out(traces),
            Pruning.model_validate(settings),
            Path(scratch),
            threads=threads,
            progress=show,
        )

    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "expected_seconds": estimate.total_s or seconds,  # one block: there is nothing to expect
        "cpu_seconds": time.process_time() - cpu_began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def random_traces(folder: Path, tokens: int) -> list[Trace]:
    """Return traces of random tokens."""
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.traces.trace import Trace

    random, vocabulary = np.random.default_rng(0), Checkpoint(folder).config["vocab_size"]
    traces = []
    for index, length in enumerate(lengths(tokens)):
        ids = tuple(random.integers(0, vocabulary, length).tolist())
        traces.append(
            Trace(
                index=index,
                task="random",
                question=f"{index}",
                gold="",
                prompt_ids=ids[:PROMPT_TOKENS],
                completion_ids=ids[PROMPT_TOKENS:],
                answer_from=None,
                thinking_tokens=len(ids[PROMPT_TOKENS:]),
                truncated=False,
                correct=True,
            )
        )

    return traces


def lengths(tokens: int) -> list[int]:
    """Return the lengths of the traces."""
    return [min(TRACE_TOKENS, tokens)] * max(tokens // TRACE_TOKENS, 1)


def held_out(traces: list[T]) -> list[T]:
    """Return those that errors are measured on."""
    return traces[: max(len(traces) // 16, 1)]


def write_model(folder: Path, blocks: int, shape: Mapping[str, int] = SHAPE) -> None:
    """Write a checkpoint with random weights, one tensor in memory at a time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = list(shapes(blocks, shape))
    header, offset = {}, 0

    for name, size in tensors:
        stop = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, stop]}
        offset = stop

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(1)

    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors:
            values = (
                np.ones(size, np.float32)
                if "norm" in name
                else random.standard_normal(size, np.float32) * 0.02
            )
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())

    config = dict(shape) | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": blocks,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def shapes(blocks: int, shape: Mapping[str, int]) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every tensor."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", [shape["vocab_size"], hidden]

    for block in range(blocks):
        for name, outputs in (("q", hidden), ("k", width), ("v", width)):
            yield f"model.layers.{block}.self_attn.{name}_proj.weight", [outputs, hidden]
            yield f"model.layers.{block}.self_attn.{name}_proj.bias", [outputs]

        yield f"model.layers.{block}.self_attn.o_proj.weight", [hidden, hidden]
        for name in ("gate", "up"):
            yield f"model.layers.{block}.mlp.{name}_proj.weight", [inner, hidden]

        yield f"model.layers.{block}.mlp.down_proj.weight", [hidden, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{block}.{name}.weight", [hidden]

    yield "model.norm.weight", [hidden]


if __name__ == "__main__":
    main()
