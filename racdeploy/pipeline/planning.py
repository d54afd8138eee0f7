"""What a build will take on this machine, before it is begun."""

from __future__ import annotations

from typing import Any

from racdeploy.pipeline.build import Build
from racdeploy.storage.stages import Stage
from racdeploy.traces.trace import TraceSet


def pruning_plan(build: Build) -> dict[str, Any]:
    """Return calibration tokens and peak memory of pruning, and what can be said about its time.

    They are of the traces where these were collected, and otherwise of the longest traces that there
    can be. Where a model has yet to answer here, which a server does for the dense one alone, the
    memory of that comes first.
    """
    from racdeploy.prune.cost import peak_bytes, trace_bytes

    job, settings = build.job, build.job.recipe
    prompts = [len(job.encoder.encode(problem.question)) for problem in job.problems("calibration")]
    cap, plan = settings.traces.max_new_tokens, dict[str, Any]()

    stage = Stage.at(build.work, "traces", build.trace_stage.inputs(job.checkpoint))
    if stage.finished:
        calibration, held_out, _ = build.prune_stage.select(TraceSet(stage.folder).read())
        tokens = sum(len(trace.ids) for trace in calibration)
        held_out_tokens, bound = sum(len(trace.ids) for trace in held_out), ""
    else:
        longest = [prompt + cap for prompt in prompts]
        tokens = sum(longest)
        held_out_count = round(settings.calibration.held_out_share * len(longest))
        held_out_tokens, bound = sum(longest[:held_out_count]), "_at_most"

    if settings.prune.schedule or not (stage.finished or settings.traces.server):
        together, prompt = min(settings.traces.batch, len(prompts)), max(prompts)
        plan["trace_memory_bytes_at_most"] = trace_bytes(
            job.checkpoint, together, prompt, prompt + cap
        )

    grid = job.joint_quant if settings.prune.joint else ""
    memory = peak_bytes(job.checkpoint, settings.prune, tokens, held_out_tokens, grid)
    return plan | {
        f"prune_tokens{bound}": tokens,
        f"prune_memory_bytes{bound}": memory,
        "prune_time": "known after the first block; the time left is printed then",
    }
