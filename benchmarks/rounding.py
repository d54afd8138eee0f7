"""Is it better to choose the codes while pruning than to round the pruned weights? Measured on the
exported file.

    python -m benchmarks.rounding --out build/rounding
    python -m benchmarks.rounding --out build/rounding-onnx --quant matmulnbits_4

Prunes with both values of ``export.rounding``, exports both, and compares each file with the dense
model: KL and top-1 on the dense model's own held-out traces, teacher-forced on the file's engine
against torch, and accuracy on the same prompts, with the interval of the gain over the pairs.
Finished stages are kept under --work and reused.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks._setup import add_settings, with_settings
from benchmarks.calibration import answers, gain
from racdeploy import quant as quants
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import ExportResult
from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.results.answers import AnswerRecord
from racdeploy.verification.stats import paired
from racdeploy.verification.top_logits import compare_checkpoints

ARMS = ("nearest", "optimized")


def main() -> None:
    """Measure both ways and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--quant", default="q4_0", help="its file format is what is exported")
    parser.add_argument(
        "--tensors",
        nargs="*",
        default=[],
        metavar="PATTERN=QUANT",
        help="number formats by GGUF name",
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=600, help="0 leaves accuracy out")
    add_settings(parser)
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    arms: list[tuple[AnswerRecord, ...]] = []

    for rounding in ARMS:
        build = Build(Job(recipe(arguments, rounding)), arguments.work, arguments.threads)
        exported = build.export(build.prune().folder, name_artifact(build.job))
        rows.append({"arm": rounding, **divergence(build, exported)})
        if arguments.prompts:
            arms.append(answers(build, exported, rounding))
            rows[-1] |= accuracy(arms[-1])
        if len(arms) == 2:
            rows.append({"arm": "gain of optimized", **gain(*arms)})

        print("\n".join(map(json.dumps, rows)), flush=True)
        (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def recipe(arguments: argparse.Namespace, rounding: str) -> Recipe:
    """Return the recipe of one way."""
    options = {
        "model": arguments.model,
        "target": quants.load(arguments.quant).formats[
            0
        ],  # the general target of a format has its name
        "tasks": tuple(arguments.tasks),
        "traces": {"count": arguments.traces},
        "prune": {"sparsity": arguments.sparsity},
        "export": {
            "quant": arguments.quant,
            "rounding": rounding,
            "tensors": dict(pair.split("=", 1) for pair in arguments.tensors),
        },
        "verify": {
            "count": max(arguments.prompts, 1),
            "parallel": 32,
            "max_new_tokens": arguments.max_new_tokens,
        },
    }
    return Recipe.combine(None, nest_settings(with_settings(options, arguments.set)))


def divergence(build: Build, exported: ExportResult) -> dict[str, float]:
    """Return KL and top-1 of a file from the dense model on held-out traces, and their tokens."""
    held_out = build.prune_stage.choose_traces(build.traces()[1]).held_out
    exact = EngineSettings(2048, 1, build.threads, "f32")
    compared = compare_checkpoints(
        lambda: closing(open_engine(build.job.backend, exported.path, exact)),
        lambda: closing(open_engine("transformers", build.job.model.folder, exact)),
        lambda: closing(open_engine(build.job.backend, exported.path, exact)),
        [(trace.prompt_ids, trace.completion_ids) for trace in held_out],
    )
    assert compared
    assert compared.pruning
    return {"tokens": compared.tokens, "kl": compared.pruning.kl, "top1": compared.pruning.top1}


def accuracy(records: tuple[AnswerRecord, ...]) -> dict[str, float]:
    """Return the accuracy of one arm with its interval, thinking length and unclosed thoughts."""
    right = sum(record.correct for record in records)
    interval = paired.wilson_interval(right, len(records))
    return {
        "accuracy": right / len(records),
        "lower": interval.lower,
        "upper": interval.upper,
        "thinking_tokens": sum(record.thinking_tokens for record in records) / len(records),
        "unclosed": sum(record.state == "open" for record in records),
    }


if __name__ == "__main__":
    main()
