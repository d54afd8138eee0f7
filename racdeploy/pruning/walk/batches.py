"""Calibration batches: traces of similar length, right-padded.

Under a causal mask no real token sees the padding, so that no padding mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from racdeploy.pruning.memory_limits import TOKENS_PER_BATCH
from racdeploy.pruning.walk.statistics import PAD
from racdeploy.traces.trace import Trace

T = TypeVar("T")


@dataclass
class Batch:
    """Sequences that pass through the blocks together."""

    ids_BT: Tensor  # 0 where padded
    segment_BT: Tensor  # index into ``SEGMENTS``, ``PAD`` where padded
    task_B: Tensor  # index into the tasks that the batches were made with
    held_out: bool  # used to measure errors, not to prune

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int((self.segment_BT != PAD).sum())


def make_batches(
    traces: Sequence[Trace],
    tasks: Sequence[str],
    *,
    held_out: bool,
    max_tokens: int = 0,
) -> list[Batch]:
    """Sort traces by length and group them into batches.

    Args:
        tasks: names; ``Batch.task_B`` has indices into them.
        max_tokens: maximum tokens of a batch, padding included; 0 means ``TOKENS_PER_BATCH``.
    """
    in_order = sorted(traces, key=lambda trace: (len(trace.ids), trace.index))
    groups = group_by_length(in_order, lambda trace: len(trace.ids), max_tokens or TOKENS_PER_BATCH)
    return [_pad(group, tasks, held_out) for group in groups]


def group_by_length(
    items: Iterable[T], length: Callable[[T], int], max_tokens: int
) -> list[list[T]]:
    """Split items, sorted by length, into groups of at most ``max_tokens`` with padding."""
    groups: list[list[T]] = []
    for item in items:
        # The item at hand is the longest of its group, so all rows are padded to its length.
        if not groups or (len(groups[-1]) + 1) * length(item) > max_tokens:
            groups.append([])
        groups[-1].append(item)
    return groups


def _pad(traces: Sequence[Trace], tasks: Sequence[str], held_out: bool) -> Batch:
    B = len(traces)
    T = max(len(trace.ids) for trace in traces)
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    segment_BT = torch.full((B, T), PAD)

    for trace, ids_T, segment_T in zip(traces, ids_BT, segment_BT, strict=True):
        length = len(trace.ids)
        ids_T[:length] = torch.tensor(trace.ids)
        segment_T[:length] = torch.tensor(trace.segments())

    task_B = torch.tensor([tasks.index(trace.task) for trace in traces])
    return Batch(ids_BT, segment_BT, task_B, held_out)
