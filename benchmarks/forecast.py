"""Is the time that a plan foretells the time that a build takes? Each stage, foretold and measured.

    python -m benchmarks.forecast --model tiny-reasoner --work build/forecast
    python -m benchmarks.forecast --model ./Qwen3-0.6B --work build/forecast --cores 2 8 16

Measured are seconds of the processor, on one core, children included: others may use the machine.
The work folder must be new, since a finished stage takes no time. With ``--cores``, nothing is run:
it prints what the plan of a default build says for so many cores like this machine's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks._settings import add_settings, with_settings
from benchmarks.calibration import answers
from racdeploy.cli.progress import write_duration
from racdeploy.pipeline import forecast
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build
from racdeploy.recipe import Recipe
from racdeploy.storage.cores import available_cores
from racdeploy.storage.speed import Speed, measure_speed

T = TypeVar("T")


def main() -> None:
    """Run a build stage by stage, and print what each was foretold to take and took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--recover-tokens", type=int, default=20_000)
    parser.add_argument("--cores", type=int, nargs="*", default=[])
    add_settings(parser)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()

    if arguments.cores:
        _foretell(arguments)
        return

    build = Build(Job(_recipe(arguments)), arguments.work, threads=1)
    print("| stage | foretold s | took s | ratio |\n|---|---|---|---|")
    _run(build)


def _foretell(arguments: argparse.Namespace) -> None:
    values = with_settings({"model": arguments.model}, arguments.set)
    build = Build(Job(Recipe.combine(None, values)), arguments.work)
    plan = check_build(build.job) | build.plan_pruning()

    works = forecast.foresee(build.job, plan, [])
    speed, measured_on = measure_speed(), available_cores()
    gflops, gbytes = speed.flops_per_s / 1e9, speed.bytes_per_s / 1e9
    print(f"{gflops:.0f} GFLOP/s on {measured_on} cores, {gbytes:.1f} GB/s\n")

    print(f"| cores | {' | '.join(works)} |\n|{'---|' * (1 + len(works))}")
    for cores in arguments.cores:
        scaled = speed.of(cores, measured_on)
        times = [write_duration(work.seconds(scaled)) for work in works.values()]
        print(f"| {cores} | {' | '.join(times)} |")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    values = {
        "model": arguments.model,
        "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
        "prune": {"sparsity": arguments.sparsity},
        "recover": {"tokens": arguments.recover_tokens},
        "verify": {
            "count": arguments.prompts,
            "max_new_tokens": arguments.max_new_tokens,
            "logit_traces": 0,
        },
    }
    return Recipe.model_validate(with_settings(values, arguments.set))


def _run(build: Build) -> None:
    job = build.job
    speed, took, (_, traces) = _timed(build.traces)

    # What was not known before: how long the answers are. A batch ends with its longest.
    lengths = [len(trace.completion_ids) for trace in traces]
    usual, longest = sum(lengths) / len(lengths), max(lengths)
    prompts = [len(trace.prompt_ids) for trace in traces]
    asked = forecast.Asked(prompts, usual, job.recipe.traces.batch, longest)
    _print("traces", forecast.answer_in_torch(job.checkpoint, asked), speed, took)

    tokens = sum(len(trace.ids) for trace in traces)
    works = forecast.foresee(job, {"prune_tokens": tokens}, traces)
    unrecovered = Build(job.unrecovered(), build.work, threads=1)

    speed, took, _ = _timed(unrecovered.prune)
    _print("pruning", works["pruning"], speed, took)
    if "recovery" in works:
        speed, took, _ = _timed(build.prune)
        _print("recovery", works["recovery"], speed, took)

    model = build.prune()
    exported = build.export(model.folder, "artifact")
    size = exported.path.stat().st_size
    speed, took, _ = _timed(lambda: answers(build, exported, "artifact"))
    _print("answers", forecast.verify(job, size, usual), speed, took)


def _timed(run: Callable[[], T]) -> tuple[Speed, float, T]:
    speed = measure_speed(time.process_time)
    began = sum(os.times()[:4])
    found = run()
    return speed, sum(os.times()[:4]) - began, found


def _print(stage: str, work: forecast.Work, speed: Speed, took: float) -> None:
    foretold = work.seconds(speed)
    print(f"| {stage} | {foretold:.1f} | {took:.1f} | {foretold / took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
