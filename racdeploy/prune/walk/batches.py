"""Calibration batches: like lengths together, right-padded, which a causal mask makes harmless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from racdeploy.prune.bounds import TOKENS_PER_BATCH
from racdeploy.prune.walk.statistics import PAD
from racdeploy.traces.trace import Trace


@dataclass
class Batch:
    """Sequences that go through the blocks together."""

    ids_BT: torch.Tensor  # 0 where padded
    stream_BT: torch.Tensor  # index into ``STREAMS``, ``PAD`` where padded
    task_B: torch.Tensor  # index into the tasks that the batches were made with
    held_out: bool  # whether the batch only measures the error


def make_batches(
    traces: Sequence[Trace],
    tasks: Sequence[str],
    *,
    held_out: bool,
    tokens: int = 0,
) -> list[Batch]:
    """Sort traces by length and group them into batches of at most so many tokens.

    At 0 these are ``TOKENS_PER_BATCH``.
    """
    most = tokens or TOKENS_PER_BATCH

    groups: list[list[Trace]] = []
    for trace in sorted(traces, key=lambda trace: (len(trace.ids), trace.index)):
        length = len(trace.ids)  # the longest so far: the others are padded to it
        if not groups or (len(groups[-1]) + 1) * length > most:
            groups.append([])

        groups[-1].append(trace)

    return [_pad(group, tasks, held_out) for group in groups]


def _pad(traces: Sequence[Trace], tasks: Sequence[str], held_out: bool) -> Batch:
    B = len(traces)
    T = max(len(trace.ids) for trace in traces)
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    stream_BT = torch.full((B, T), PAD)

    for trace, ids_T, stream_T in zip(traces, ids_BT, stream_BT, strict=True):
        length = len(trace.ids)
        ids_T[:length] = torch.tensor(trace.ids)
        stream_T[:length] = torch.tensor(trace.streams())

    task_B = torch.tensor([tasks.index(trace.task) for trace in traces])
    return Batch(ids_BT, stream_BT, task_B, held_out)
