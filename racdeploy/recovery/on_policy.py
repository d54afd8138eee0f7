"""On-policy training data: the sparse model's own answers, cut at their likely end."""

from __future__ import annotations

from dataclasses import replace

from racdeploy.recovery.divergence import LMHead
from racdeploy.recovery.training_batches import dense_states
from racdeploy.recovery.training_run import TrainingRun
from racdeploy.recovery.truncation import truncate_answers
from racdeploy.traces.trace import Trace


def truncate_own_answers(run: TrainingRun) -> TrainingRun:
    """Return the run with its answers truncated to their likely part; empty ones are dropped."""

    def cut() -> list[Trace]:
        return truncate_answers(
            LMHead.from_checkpoint(run.dense, run.device), states, run.train_traces
        )

    # Processors may round near-ties differently, so the first process decides for all.
    where = (run.folder, "own", run.device, run.processes)
    with dense_states(run.dense, run.train_traces, *where) as states:
        traces = run.processes.run_on_first(cut)

    answered = [trace for trace in traces if trace.completion_ids]
    return replace(run, train_traces=answered)
