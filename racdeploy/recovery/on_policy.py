"""On-policy training data: the sparse model's own answers, cut where they stop being likely.

The dense model would never write what follows, so its distributions there teach nothing. A token is
likely if it is among the dense model's top tokens at its position. An answer is cut after its last
window of mostly likely tokens; unlikely passages before that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from racdeploy.pruning.walk.activations import Activations
from racdeploy.recovery.divergence import LMHead, chunks
from racdeploy.recovery.training_batches import dense_states
from racdeploy.recovery.training_run import TrainingRun
from racdeploy.traces.trace import Trace

TOP_K = 16  # most likely tokens of the dense model at a position
WINDOW_TOKENS = 32  # consecutive tokens that are judged together
MIN_LIKELY_SHARE = 0.75  # share of a window that must be likely


def truncate_answers(head: LMHead, states: Activations, traces: Sequence[Trace]) -> list[Trace]:
    """Return the traces, truncated; ``states`` are the dense model's last hidden states."""
    truncated = []
    for index, trace in enumerate(traces):
        states_TD = states[index].to(head.weight_VD.device)
        end = find_length(find_likely_tokens(head, states_TD, trace))
        truncated.append(_shorten(trace, end))
    return truncated


@torch.inference_mode()
def find_likely_tokens(head: LMHead, states_TD: torch.Tensor, trace: Trace) -> list[bool]:
    """Return a bool per completion token: is it among the dense model's top tokens?"""
    begin = len(trace.prompt_ids)
    if not trace.completion_ids:
        return []

    # A state predicts the next token.
    states_ND = states_TD[begin - 1 : len(trace.ids) - 1]
    token_N = torch.tensor(trace.completion_ids, device=states_ND.device)

    likely = []

    for chunk in chunks(head, len(states_ND)):
        logits_NV = head.logits(states_ND[chunk])
        token_logit_N1 = logits_NV.gather(1, token_N[chunk, None])
        likely.append((logits_NV > token_logit_N1).sum(1) < TOP_K)

    result: list[bool] = torch.cat(likely).tolist()
    return result


def find_length(find_likely_tokens: Sequence[bool]) -> int:
    """Return the number of tokens to keep: up to the end of the last likely window, or all."""
    length = len(find_likely_tokens)
    window = min(WINDOW_TOKENS, length)

    likely = sum(find_likely_tokens[length - window :])
    if not length or likely >= MIN_LIKELY_SHARE * window:
        return length

    # Slide the window towards the start: one token enters the count, one leaves it.
    for start in range(length - window - 1, -1, -1):
        likely += find_likely_tokens[start] - find_likely_tokens[start + window]
        if likely >= MIN_LIKELY_SHARE * window:
            return start + window

    return 0


def _shorten(trace: Trace, end: int) -> Trace:
    if end == len(trace.completion_ids):
        return trace

    has_answer = trace.answer_from is not None and trace.answer_from < end
    return replace(
        trace,
        completion_ids=trace.completion_ids[:end],
        answer_from=trace.answer_from if has_answer else None,
        truncated=True,
        correct=False,
    )


def truncate_own_answers(run: TrainingRun) -> TrainingRun:
    """Return the run with its answers truncated to their likely part; empty ones are dropped."""

    def cut() -> list[Trace]:
        return truncate_answers(
            LMHead.from_checkpoint(run.dense, run.device), states, run.train_traces
        )

    # Processors may round near-ties differently, so one process decides for all.
    with dense_states(
        run.dense, run.train_traces, run.folder, "own", device=run.device, share=run.share
    ) as states:
        traces = run.share.run_once(cut)

    answered = [trace for trace in traces if trace.completion_ids]
    return replace(run, train_traces=answered)
