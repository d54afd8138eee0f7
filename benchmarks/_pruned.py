"""A pruned model and held-out traces of the dense one, for the benchmarks that compare exported
files with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.storage.caches import default_work

Trace = tuple[tuple[int, ...], tuple[int, ...]]


def parser(about: str) -> argparse.ArgumentParser:
    """Return a parser of what :func:`prune` takes."""
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--model", default="tiny-reasoner")
    made.add_argument("--task", default="", help="jsonl:FILE; default: the procedural tasks")
    made.add_argument("--sparsity", type=float, default=0.5)
    made.add_argument("--traces", type=int, default=256)
    made.add_argument("--max-new-tokens", type=int, default=1024)
    made.add_argument("--compared", type=int, default=16, help="held-out traces for the KL")
    made.add_argument("--work", type=Path, default=default_work())
    made.add_argument("--threads", type=int, default=0)
    made.add_argument("--out", type=Path, required=True)
    return made


def prune(arguments: argparse.Namespace) -> tuple[Build, Path, list[Trace]]:
    """Return the build, the folder of the pruned model, and prompt and completion ids of held-out
    traces.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.combine(
        None,
        {
            "model": arguments.model,
            "tasks": (arguments.task,) if arguments.task else (),
            "traces": {"count": arguments.traces, "max_new_tokens": arguments.max_new_tokens},
            "calibration": {"keep_truncated": arguments.model != "tiny-reasoner"},
            "prune": {"sparsity": arguments.sparsity},
        },
    )
    build = Build(Job(recipe), arguments.work, arguments.threads)
    _, held_out, _ = build.prune_stage.select(build.traces()[1])
    traces = [(trace.prompt_ids, trace.completion_ids) for trace in held_out[: arguments.compared]]
    return build, build.prune().folder, traces
