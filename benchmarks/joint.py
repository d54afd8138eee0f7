"""Is it better to choose the codes while pruning than to round the pruned weights? Measured on the exported file.

    python benchmarks/joint.py --out build/joint --tensors token_embd=q8_0

Prunes with and without ``prune.joint``, exports both, and compares each file with the dense model: KL and top-1 on the
dense model's own held-out traces, teacher-forced on llama.cpp against torch, and accuracy on the same prompts.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path

from racdeploy.backends import EngineSettings, open_engine
from racdeploy.job import Job
from racdeploy.pipeline import Build, default_work
from racdeploy.recipe import Recipe
from racdeploy.verify import stats
from racdeploy.verify._measure import compare_logits


def main() -> None:
    """Measure both ways and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--quant", default="q4_0")
    parser.add_argument("--tensors", nargs="*", default=[], metavar="PATTERN=QUANT", help="number formats by GGUF name")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--prompts", type=int, default=600, help="0 leaves accuracy out")
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    exact = EngineSettings(2048, 1, arguments.threads, "f32")
    for joint in (False, True):
        build = Build(Job(recipe(arguments, joint)), arguments.work, arguments.threads)
        _, held_out, _ = build.calibration(build.traces()[1])
        exported = build.export(build.prune().folder, build.job.artifact_name)
        compared = compare_logits(
            lambda path=exported.path: closing(open_engine("llamacpp", path, exact)),
            lambda path=build.job.model.folder: closing(open_engine("transformers", path, exact)),
            lambda path=exported.path: closing(open_engine("llamacpp", path, exact)),
            [(trace.prompt_ids, trace.completion_ids) for trace in held_out],
        )
        assert compared
        row = {"joint": joint, "tokens": compared.tokens, "kl": compared.pruning_kl, "top1": compared.pruning_top1}
        if arguments.prompts:
            arm = "joint" if joint else "rounded"
            records = build.verification.answer(exported, arm, EngineSettings(2048, 32)).records
            right = sum(record.correct for record in records)
            interval = stats.wilson_interval(right, len(records))
            row |= {"accuracy": right / len(records), "lower": interval.lower, "upper": interval.upper}
            row["thinking_tokens"] = sum(record.thinking_tokens for record in records) / len(records)
        rows.append(row)
        print(json.dumps(row), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def recipe(arguments: argparse.Namespace, joint: bool) -> Recipe:
    """Return the recipe of one way."""
    return Recipe.combine(
        None,
        {
            "model": arguments.model,
            "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
            "calibration": {"keep_truncated": arguments.model != "tiny-reasoner"},
            "prune": {"sparsity": arguments.sparsity, "joint": joint},
            "export": {
                "quant": arguments.quant,
                "tensors": dict(pair.split("=", 1) for pair in arguments.tensors),
            },
            "verify": {"count": max(arguments.prompts, 1), "max_new_tokens": arguments.max_new_tokens},
        },
    )


if __name__ == "__main__":
    main()
