"""What a build will take on this machine, before it is begun."""

from __future__ import annotations

from typing import Any

from racdeploy.pipeline.build import Build
from racdeploy.storage.stages import Stage
from racdeploy.traces.trace import TraceSet


def pruning_plan(build: Build) -> dict[str, Any]:
    """Return calibration tokens, seconds and peak memory of pruning, measured in a few seconds on one block.

    They are of the traces where these were collected, and otherwise of the longest traces that there can be. Where a
    model has yet to answer here, which a server does for the dense one alone, the memory of that comes first.
    """
    from racdeploy.prune.cost import predict, trace_bytes

    job, settings = build.job, build.job.recipe
    prompts = [len(job.encoder.encode(problem.question)) for problem in job.problems("calibration")]
    cap, plan = settings.traces.max_new_tokens, dict[str, Any]()
    stage = Stage.at(build.work, "traces", build.trace_inputs(job.checkpoint))
    if stage.finished:
        calibration, held_out, _ = build.calibration(TraceSet(stage.folder).read())
        lengths, bound = (
            [[len(trace.ids) for trace in part] for part in (calibration, held_out)],
            "",
        )
    else:
        longest = [prompt + cap for prompt in prompts]
        held = round(settings.calibration.held_out_share * len(longest))
        lengths, bound = [longest, longest[:held]], "_at_most"
    if settings.prune.schedule or not (stage.finished or settings.traces.server):
        together, prompt = min(settings.traces.batch, len(prompts)), max(prompts)
        plan["trace_memory_bytes_at_most"] = trace_bytes(
            job.checkpoint, together, prompt, prompt + cap
        )
    grid = job.grid if settings.prune.joint else ""
    cost = predict(job.checkpoint, settings.prune, lengths[0], lengths[1], build.threads, grid)
    return plan | {
        f"prune_tokens{bound}": sum(lengths[0]),
        f"prune_seconds{bound}": round((len(settings.prune.schedule) or 1) * cost.seconds, 1),
        f"prune_memory_bytes{bound}": cost.peak_bytes,
    }
