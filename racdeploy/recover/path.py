"""Cut a model's own answers where they leave the dense model's path for good.

What comes after is text that the dense model would never write: its grades there teach nothing. A
token is on the path if it is among the dense model's most likely ones at its place. An answer that
strays and comes back is whole; one that does not ends where its last good stretch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from racdeploy.prune.walk.activations import Activations
from racdeploy.recover.divergence import Head
from racdeploy.traces.trace import Trace

LIKELY = 16  # tokens of the dense model at a place
STRETCH = 32  # tokens in a row that are looked at together
GOOD = 0.75  # share of a stretch that is on the path


def cut_answers(head: Head, states: Activations, traces: Sequence[Trace]) -> list[Trace]:
    """Return the traces, each up to where it leaves the path; ``states`` are the dense model's."""
    cut = []
    for place, trace in enumerate(traces):
        states_TD = states[place].to(head.weight_VD.device)
        end = find_end(on_path(head, states_TD, trace))
        cut.append(_shorten(trace, end))
    return cut


@torch.inference_mode()
def on_path(head: Head, states_TD: torch.Tensor, trace: Trace) -> list[bool]:
    """Return, for each completion token, whether the dense model finds it likely."""
    begin = len(trace.prompt_ids)
    if not trace.completion_ids:
        return []

    # A state says the next token.
    saying_ND = states_TD[begin - 1 : len(trace.ids) - 1]
    said_N = torch.tensor(trace.completion_ids, device=saying_ND.device)

    likely = []

    for start in range(0, len(saying_ND), head.chunk_tokens):
        chunk = slice(start, start + head.chunk_tokens)
        logits_NV = head.logits(saying_ND[chunk])
        own_N1 = logits_NV.gather(1, said_N[chunk, None])
        likely.append((logits_NV > own_N1).sum(1) < LIKELY)

    result: list[bool] = torch.cat(likely).tolist()
    return result


def find_end(on_path: Sequence[bool]) -> int:
    """Return how many tokens stay: up to the end of the last good stretch, or all of them."""
    length = len(on_path)
    stretch = min(STRETCH, length)

    good = sum(on_path[length - stretch :])
    if not length or good >= GOOD * stretch:
        return length

    for start in range(length - stretch - 1, -1, -1):
        good += on_path[start] - on_path[start + stretch]
        if good >= GOOD * stretch:
            return start + stretch

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
