"""How much less does a number format lose when its scales are chosen for the weights that matter?

    python benchmarks/quant_error.py --out build/quant-error

Prunes a model, and quantizes it with ggml's scales and with those that the pruning's own statistic chooses. Prints for
each number format the weighted squared error of the linears, chosen over ggml's, and the KL of the exported file from
the pruned checkpoint, teacher-forced on held-out traces: torch against llama.cpp.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path

import numpy as np

from racdeploy import plugins, quant
from racdeploy.artifacts import IMPORTANCE_FILE
from racdeploy.backends import EngineSettings, open_engine
from racdeploy.checkpoint import Checkpoint
from racdeploy.export import gguf
from racdeploy.export._importance import Importance
from racdeploy.job import Job
from racdeploy.pipeline import Build, default_work
from racdeploy.recipe import Recipe
from racdeploy.verify._measure import compare_logits

QUANTS = ("q8_0", "q6_k", "q5_0", "q4_0", "mxfp4", "q3_k", "sparse_q4", "q4_k_m", "iq4_nl")


def main() -> None:
    """Prune, quantize both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--task", default="", help="jsonl:FILE; default: the procedural tasks")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--traces", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--compared", type=int, default=16, help="held-out traces for the KL")
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build = Build(Job(recipe(arguments)), arguments.work, arguments.threads)
    _, held_out, _ = build.calibration(build.traces()[1])
    folder = build.prune().folder
    traces = [(trace.prompt_ids, trace.completion_ids) for trace in held_out[: arguments.compared]]
    rows = []
    print("| quant | bits | weighted error, chosen / ggml | KL ggml | KL chosen | top-1 ggml | top-1 chosen | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.quants:
        row = {"quant": name, "ratio": ratio(folder, name) if name in plugins.names("quant") else None}
        for arm, importance in (("ggml", "none"), ("chosen", "")):
            file = arguments.out / f"{arm}.gguf"
            result = gguf.export(Checkpoint(folder), file, quant=name, importance=importance)
            row |= measure(folder, file, traces, arm, arguments.threads)
        linears = [t for t in result.tensors if t.source in build.job.prunable()]
        weights = sum(t.shape[0] * t.shape[1] for t in linears)
        row["bits"] = 8 * sum(t.size_bytes for t in linears) / weights
        row["zeros"] = sum(t.zeros * t.shape[0] * t.shape[1] for t in linears) / weights
        rows.append(row)
        shown = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(
            f"| {name} | {row['bits']:.2f} | {shown} | {row['kl_ggml']:.2e} | {row['kl_chosen']:.2e} |"
            f" {row['top1_ggml']:.2%} | {row['top1_chosen']:.2%} | {row['tokens']} |",
            flush=True,
        )
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def recipe(arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of the pruned model."""
    return Recipe.combine(
        None,
        {
            "model": arguments.model,
            "tasks": (arguments.task,) if arguments.task else (),
            "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
            "calibration": {"keep_truncated": arguments.model != "tiny-reasoner"},
            "prune": {"sparsity": arguments.sparsity},
        },
    )


def ratio(folder: Path, name: str) -> float | None:
    """Return the weighted squared error of all linears with chosen scales, over that with ggml's."""
    checkpoint, form = Checkpoint(folder), quant.load_ggml(name)
    known = Importance.read(folder / IMPORTANCE_FILE)
    errors = np.zeros(2)
    for source in known.means:
        weight_OI = checkpoint.read(source)
        importance_I = known.of("", source, weight_OI.shape[1])
        if importance_I is None or quant.fits(form, weight_OI.shape[1]):
            continue
        for index, given in enumerate((importance_I, None)):
            error_OI = form.dequantize(form.quantize(weight_OI, given), weight_OI.shape[1]) - weight_OI
            errors[index] += float((np.square(error_OI, dtype=np.float64) * importance_I).sum())
    return float(errors[0] / errors[1]) if errors[1] else None


def measure(
    folder: Path, file: Path, traces: list[tuple[tuple[int, ...], tuple[int, ...]]], arm: str, threads: int
) -> dict[str, float]:
    """Return KL and top-1 of a file against the pruned checkpoint under torch."""
    exact = EngineSettings(2048, 1, threads, "f32")
    compared = compare_logits(
        lambda: closing(open_engine("transformers", folder, exact)),
        lambda: closing(open_engine("transformers", folder, exact)),
        lambda: closing(open_engine("llamacpp", file, exact)),
        traces,
    )
    assert compared
    return {f"kl_{arm}": compared.export_kl, f"top1_{arm}": compared.export_top1, "tokens": compared.tokens}


if __name__ == "__main__":
    main()
