"""Training batches: whole traces in random order, with the dense model's last hidden states.

The states are on disk. They hold the dense model's whole next-token distribution in a few hundred
numbers per token, in place of a vocabulary. They are computed with one dense block in memory at a
time. Each process computes the states of some batches and sends them to the others, so that any
process can train on any batch.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.pruning.walk.activations import Activations
from racdeploy.pruning.walk.batches import group_by_length, make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.recovery.examples import Example
from racdeploy.traces.trace import Trace

T = TypeVar("T")
MICRO_BATCH_TOKENS = 4096
"""Maximum tokens of a forward pass, padding included; a longer trace is a batch of its own."""
MAX_STORED_BYTES = 16 << 30
"""Maximum disk space for hidden states of the dense model."""
_POOL_BATCHES = 16  # whose traces are sorted by length together


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of traces, padded on the right, where the causal mask hides it.

    Args:
        ids_BT: token ids, 0 where padded.
        dense_BTD: the dense model's last hidden states, 0 where padded.
        weight_BT: loss weight of the prediction made at each token; 0 leaves it out.
        token_BT: for each position the next token's id if that is learned, else -1.
        pair_BT: for each position the number of its pair of answers, doubled, and 1 more in the
            rejected one; -1 outside of pairs.
        tokens: number of tokens without padding.
    """

    ids_BT: Tensor
    dense_BTD: Tensor
    weight_BT: Tensor
    token_BT: Tensor
    pair_BT: Tensor
    tokens: int


class TrainingBatches:
    """Examples with the dense model's last hidden states, and their division into batches.

    ``states`` are those of all answers, in the order of the examples.
    """

    def __init__(self, examples: Sequence[Example], states: Activations) -> None:
        self.examples = examples
        self.states = states
        self._starts = list(accumulate((len(each.traces) for each in examples), initial=0))
        self._lengths = [_count_padded_tokens(each) for each in examples]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples."""
        return sum(self._lengths)

    def batch(self, indices: Sequence[int]) -> TrainingBatch:
        """Return the batch of the examples with these indices."""
        rows = [
            (index, number, trace)
            for index in indices
            for number, trace in enumerate(self.examples[index].traces)
        ]
        B = len(rows)
        T = max(len(trace.ids) for *_, trace in rows)
        D = self.states[0].shape[1]

        ids_BT = torch.zeros(B, T, dtype=torch.long)
        weight_BT = torch.zeros(B, T)
        dense_BTD = torch.zeros(B, T, D)
        token_BT, pair_BT = torch.full((2, B, T), -1)

        for row, (index, number, trace) in enumerate(rows):
            example = self.examples[index]
            length = len(trace.ids)
            ids_BT[row, :length] = torch.tensor(trace.ids)

            # A state predicts the next token, so it has the weight of the token after it.
            learned = slice(len(trace.prompt_ids) - 1, length - 1)
            weight_BT[row, learned] = 1.0
            completion = len(trace.completion_ids)
            states_TD = self.states[self._starts[index] + number]
            dense_BTD[row, learned] = states_TD[len(states_TD) - 1 - completion : -1]

            if example.learns_tokens or len(example.traces) > 1:
                token_BT[row, learned] = torch.tensor(trace.completion_ids)
            if len(example.traces) > 1:
                pair_BT[row, learned] = 2 * index + number

        tokens = sum(len(trace.ids) for *_, trace in rows)
        return TrainingBatch(
            ids_BT=ids_BT,
            dense_BTD=dense_BTD,
            weight_BT=weight_BT,
            token_BT=token_BT,
            pair_BT=pair_BT,
            tokens=tokens,
        )

    def batches_by_length(self) -> list[list[int]]:
        """Return batches of trace indices, every trace once, sorted by length."""
        by_length = sorted(range(len(self._lengths)), key=self._lengths.__getitem__)
        return group_by_length(by_length, self._lengths.__getitem__, MICRO_BATCH_TOKENS)

    def shard(self, batches: Sequence[Sequence[int]], share: JobShare) -> Iterator[TrainingBatch]:
        """Yield this process's share of some batches: the same number in every process."""
        pieces = split_evenly(batches, self._lengths, share.count)

        for start in range(0, len(pieces), share.count):
            together = pieces[start : start + share.count]
            own = share.take(together)
            if own is not None:
                yield self.batch(own)
                continue

            # Nothing is left for this process, but FSDP needs its forward and backward pass.
            idle = self.batch(together[-1][:1])
            yield replace(idle, weight_BT=torch.zeros_like(idle.weight_BT), tokens=0)

    def draw_steps(self, tokens: int, batch_tokens: int, seed: int) -> list[list[list[int]]]:
        """Return optimizer steps of about ``batch_tokens``; a step has batches of trace indices.

        There are as many as ``tokens`` takes. An epoch has every trace once. Each epoch
        draws other batches, of traces of similar length, so that there is little padding.
        """
        micro_tokens = min(batch_tokens, MICRO_BATCH_TOKENS)
        generator = random.Random(seed)

        def draw() -> list[list[int]]:
            return _shuffle(self._lengths, micro_tokens, generator)

        def size(indices: Sequence[int]) -> int:
            return sum(self._lengths[index] for index in indices)

        return plan_steps(draw, size, tokens, batch_tokens)


def _count_padded_tokens(example: Example) -> int:
    """Return the tokens of an example in a batch: its answers are rows, as long as the longest."""
    longest = max(len(trace.ids) for trace in example.traces)
    return len(example.traces) * longest


def plan_steps(
    draw: Callable[[], Sequence[T]], size: Callable[[T], int], tokens: int, batch_tokens: int
) -> list[list[T]]:
    """Return steps of about ``batch_tokens``, each a list of batches, ``tokens`` in all.

    Args:
        draw: returns the batches of an epoch.
        size: returns the tokens of a batch.
    """
    steps: list[list[T]] = [[]]
    planned = tokens_in_step = 0

    while planned < tokens:
        for batch in draw():
            if planned >= tokens:
                break
            if tokens_in_step >= batch_tokens:
                steps.append([])
                tokens_in_step = 0

            steps[-1].append(batch)
            planned += size(batch)
            tokens_in_step += size(batch)

    return steps


def _shuffle(
    lengths: Sequence[int], micro_tokens: int, generator: random.Random
) -> list[list[int]]:
    """Return batches of trace indices, every trace once, in random order.

    Only traces of one random pool are sorted by length together: sorting all would make the same
    batches in every epoch.
    """
    indices = list(range(len(lengths)))
    generator.shuffle(indices)

    mean = sum(lengths) / len(lengths)
    pool = max(1, round(_POOL_BATCHES * micro_tokens / mean))

    batches = []
    for start in range(0, len(indices), pool):
        by_length = sorted(indices[start : start + pool], key=lengths.__getitem__)
        batches += group_by_length(by_length, lengths.__getitem__, micro_tokens)

    generator.shuffle(batches)
    return batches


def split_evenly(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], count: int
) -> list[Sequence[int]]:
    """Return the batches split so that their number is a multiple of ``count`` processes.

    The largest is halved until that is so, or until every batch is one trace. They are sorted by
    size, since processes take neighbours at the same time and wait for the largest.
    """
    result = list(batches)
    if count == 1:
        return result

    def size(batch: Sequence[int]) -> int:
        return len(batch) * max(lengths[index] for index in batch)

    while len(result) % count:
        largest = max((batch for batch in result if len(batch) > 1), key=size, default=None)
        if largest is None:
            break

        result.remove(largest)
        result += [largest[::2], largest[1::2]]

    return sorted(result, key=size, reverse=True)


def limit_to_disk(traces: Sequence[Trace], width: int, stored_bytes: int) -> list[Trace]:
    """Return the first traces whose states, ``width`` floats per token, fit ``stored_bytes``."""
    sizes = accumulate(4 * width * len(trace.ids) for trace in traces)
    return list(traces[: max(1, bisect([*sizes], stored_bytes))])


@contextmanager
def dense_states(
    dense: Checkpoint,
    traces: Sequence[Trace],
    folder: Path,
    name: str,
    *,
    device: torch.device,
    share: JobShare = WHOLE_SHARE,
) -> Iterator[Activations]:
    """Compute the dense model's last hidden states, states_TD of each trace, in a file.

    The file is removed at the end of the ``with`` body.
    """
    blocks = BlockwiseModel(dense, "float32", device)
    tasks = sorted({trace.task for trace in traces})
    batches = make_batches(traces, tasks, held_out=False)
    owners = share.assign_owners([batch.ids_BT.numel() for batch in batches])
    own_numbers = share.list_owned(owners)

    width = dense.shape.hidden_size
    shapes = [(len(trace.ids), width) for trace in traces]
    states = Activations(shapes, folder / f"dense-{name}.bin")

    try:
        with (
            torch.inference_mode(),
            closing(CalibrationPass(blocks, batches, folder, f"passing-{name}")) as passing,
        ):
            passing.embed(own_numbers)
            for block in range(dense.shape.block_count):
                loaded = blocks.load_block(block)
                for number in own_numbers:
                    passing.advance(loaded, number)
                blocks.meta_block(block).to("meta")

            norm = blocks.load_final_norm()
            # ``make_batches`` sorts the traces in the same way.
            order = sorted(range(len(traces)), key=lambda i: (len(traces[i].ids), traces[i].index))
            in_order = iter(order)
            for number, batch in enumerate(batches):
                if number in own_numbers:
                    hidden_BTD = norm(blocks.to_device(passing.hidden[number])).cpu()

                # Every process joins in the broadcast of every trace, in the same order.
                for row, index in enumerate(islice(in_order, len(batch.ids_BT))):
                    states_TD = torch.empty(shapes[index])
                    if number in own_numbers:
                        states_TD = hidden_BTD[row, : len(states_TD)].clone()
                    states[index] = share.send_to_all(states_TD, owners[number])

        yield states
    finally:
        states.close()
