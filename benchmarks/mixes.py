"""Are the formats that a survey chooses, tensor by tensor, better than llama.cpp's mixes, and does
the error that it predicts rank files as their KL does?

    python -m benchmarks.mixes --out build/mixes

Tries number formats on every linear of the dense model, and exports it in each of them, in presets,
and in the mix of the least predicted error that takes no more bytes than each of these. All scales
are chosen by one importance. KL is that of the file on llama.cpp from torch, teacher-forced on
held-out traces of the dense model, of all positions and without the thousandth that differs most:
one token that flips can outweigh all others. Writes results.json after every file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._setup import add_settings, with_settings
from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines import open_engine
from racdeploy.export import gguf
from racdeploy.export.gguf.tensors import plan_tensors
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.options_stage import OptionsStage
from racdeploy.prune.surveyed import Surveyed, list_options
from racdeploy.quant import IMPORTANCE_FILE, presets
from racdeploy.recipe import Recipe
from racdeploy.storage.caches import default_work
from racdeploy.tune import mix
from racdeploy.verify.measure import divergences, predict_completion

RIVALS = ("q8_0", "q6_k", "q5_k_m", "q5_k", "q4_k_m", "q4_k_s", "q4_k", "q4_0", "q3_k_m", "q3_k")
Trace = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class File:
    """What is exported, and what was predicted of it."""

    name: str
    quant: str
    tensors: dict[str, str]
    size_bytes: int
    error: float


def main() -> None:
    """Survey, choose, export, and print a table."""
    arguments = _parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    build = Build(Job(_recipe(arguments)), arguments.work, arguments.threads)
    calibration, held_out, _ = build.prune_stage.select(build.traces()[1])
    traces = [(trace.prompt_ids, trace.completion_ids) for trace in held_out[: arguments.compared]]

    start = time.monotonic()
    stage = OptionsStage(
        build.place,
        build.job.checkpoint,
        build.job.recipe.calibration,
        build.job.recipe.prune,
        list_options("gguf", most_bits=8.5),
        most_tokens=arguments.tokens,
    )
    surveyed = stage.run(calibration)
    print(f"{surveyed.tokens} tokens surveyed in {time.monotonic() - start:.0f} s")

    importance = build.prune().folder / IMPORTANCE_FILE  # of the dense model: nothing is pruned
    checkpoint = build.job.checkpoint
    exact = EngineSettings(2048, 1, arguments.threads, "f32")
    with open_engine("transformers", checkpoint.folder, exact) as engine:
        references = [predict_completion(engine, trace) for trace in traces]
    print(f"{sum(map(len, references))} tokens of {len(traces)} held-out traces")

    rows: list[dict[str, Any]] = []
    for file in list_files(build, surveyed, arguments.rivals):
        path = arguments.out / "candidate.gguf"
        gguf.export(
            checkpoint,
            path,
            quant=file.quant,
            tensors=file.tensors,
            importance=str(importance),
        )
        kl_T, top1 = _measure(references, path, traces, exact)
        found = {"kl": float(kl_T.mean()), "kl_usual": _trim(kl_T), "top1": top1}
        rows.append({**vars(file), **found})
        print(
            f"| {file.name} | {file.size_bytes:,} | {file.error:.2e} | {found['kl']:.2e} "
            f"| {found['kl_usual']:.2e} | {top1:.2%} |"
        )
        (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))

    for key in ("kl", "kl_usual"):
        errors, kls = [row["error"] for row in rows], [row[key] for row in rows]
        print(f"rank correlation of predicted error and {key}: {_correlate(errors, kls):.3f}")


def list_files(build: Build, surveyed: Surveyed, rivals: Sequence[str]) -> list[File]:
    """Return each rival, and the mix that takes no more bytes."""
    checkpoint = build.job.checkpoint
    ways = mix.list_ways(checkpoint, mix.plan(checkpoint), surveyed)
    files = []

    for name in rivals:
        planned = {each.name: each for each in plan_tensors(checkpoint, presets.read(name))}
        size_bytes = 0
        error = 0.0

        for tensor, own in ways.items():
            by_option = {way.option: way for way in own}
            way = by_option.get(planned[tensor].quant_real) or own[0]
            size_bytes += way.size_bytes
            error += way.error

        files.append(File(name, name, {}, size_bytes, error))
        found = mix.choose(ways, size_bytes)
        export = found.export()
        files.append(
            File(
                f"mix as large as {name}",
                export["quant"],
                export["tensors"],
                found.size_bytes,
                found.error,
            )
        )

    return files


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--rivals", nargs="+", default=RIVALS)
    parser.add_argument("--traces", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--compared", type=int, default=32, help="held-out traces for the KL")
    parser.add_argument("--tokens", type=int, default=8192, help="of the survey")
    add_settings(parser)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    options = {
        "model": arguments.model,
        "tasks": tuple(arguments.tasks),
        "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
        "prune": {"sparsity": 0.0, "method": "magnitude"},
    }
    return Recipe.combine(None, with_settings(options, arguments.set))


def _measure(
    references: Sequence[NDArray[np.float32]],
    file: Path,
    traces: Sequence[Trace],
    exact: EngineSettings,
) -> tuple[NDArray[np.float64], float]:
    """Return the KL of a file from torch at every position, and the share of equal choices."""
    kls, same = [], []
    with open_engine("llamacpp", file, exact) as engine:
        for reference_TV, trace in zip(references, traces, strict=True):
            kl_T, same_T, _ = divergences(reference_TV, predict_completion(engine, trace))
            kls.append(kl_T)
            same.append(same_T)
    return np.concatenate(kls), float(np.concatenate(same).mean())


def _trim(kl_T: NDArray[np.float64]) -> float:
    """Return the mean without the thousandth of the positions that differs most."""
    kept = len(kl_T) - len(kl_T) // 1000
    return float(np.sort(kl_T)[:kept].mean())


def _correlate(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    first_N, second_N = (np.argsort(np.argsort(values)) for values in (left, right))
    return float(np.corrcoef(first_N, second_N)[0][1])


if __name__ == "__main__":
    main()
