"""What is learned: whole traces in random order, beside what the dense model made of each token.

The dense model's last hidden states are on disk, and with them its whole distribution: a few
hundred numbers a token in place of a vocabulary. One dense block is in memory at a time.

Of several processes each makes the states of some batches and gets the others'; so any batch may be
learned by any of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.walk.activations import Activations
from racdeploy.prune.walk.batches import Batch, make_batches
from racdeploy.prune.walk.blocks import Blocks
from racdeploy.prune.walk.flow import Flow
from racdeploy.recipe import StreamWeights
from racdeploy.traces.trace import STREAMS, Trace

T = TypeVar("T")
BATCH_TOKENS = 4096
"""Most tokens that go through the student together, padding included; a longer trace is alone."""
STORED_BYTES = 16 << 30
"""Most disk that hidden states of the dense model take."""
_POOL = 16  # batches whose traces are sorted by length together


@dataclass(frozen=True)
class Example:
    """Traces that go through the student together, right-padded, which a causal mask hides.

    Args:
        ids_BT: 0 where padded.
        dense_BTD: the dense model's last hidden states, 0 where padded.
        weight_BT: what the prediction after each token counts; 0 where nothing is to learn.
        tokens: of the traces, without padding.
    """

    ids_BT: Tensor
    dense_BTD: Tensor
    weight_BT: Tensor
    tokens: int


class Lessons:
    """Traces, and the dense model's last hidden state at each of their tokens."""

    def __init__(
        self, traces: Sequence[Trace], states: Activations, weights: StreamWeights
    ) -> None:
        self.traces, self.states = traces, states
        self._lengths = [len(trace.ids) for trace in traces]
        self._weights = [getattr(weights, stream) for stream in STREAMS]

    def __len__(self) -> int:
        return len(self.traces)

    @property
    def tokens(self) -> int:
        """Of all traces together."""
        return sum(self._lengths)

    def example(self, places: Sequence[int]) -> Example:
        """Put some of the traces together."""
        B, T = len(places), max(self._lengths[place] for place in places)
        D = self.states[places[0]].shape[1]

        ids_BT = torch.zeros(B, T, dtype=torch.long)
        weight_BT = torch.zeros(B, T)
        dense_BTD = torch.zeros(B, T, D)

        for row, place in enumerate(places):
            trace, length = self.traces[place], self._lengths[place]
            ids_BT[row, :length] = torch.tensor(trace.ids)
            dense_BTD[row, :length] = self.states[place]

            # A state says the next token: its weight is that of the token after it.
            weights = [self._weights[stream] for stream in trace.streams()]
            weight_BT[row, : length - 1] = torch.tensor(weights[1:])

        tokens = sum(self._lengths[place] for place in places)
        return Example(ids_BT, dense_BTD, weight_BT, tokens)

    def in_order(self) -> list[list[int]]:
        """Return every trace once, in batches of like lengths."""
        by_length = sorted(range(len(self._lengths)), key=self._lengths.__getitem__)
        return _cut(self._lengths, by_length, BATCH_TOKENS)

    def share(self, batches: Sequence[Sequence[int]], processes: Processes) -> Iterator[Example]:
        """Yield this process's part of some batches: as many examples as every process gets."""
        count = processes.count
        pieces = split_evenly(batches, self._lengths, count)

        for start in range(0, len(pieces), count):
            together = pieces[start : start + count]
            if processes.rank < len(together):
                yield self.example(together[processes.rank])
                continue

            # Nothing is left for this one, but the others cannot compute without it.
            idle = self.example(together[-1][:1])
            yield replace(idle, weight_BT=torch.zeros_like(idle.weight_BT), tokens=0)

    def plan(self, tokens: int, step_tokens: int, seed: int) -> list[list[list[int]]]:
        """Return steps of about ``step_tokens``, each batches of places, until there are enough.

        Every trace comes once before any comes again. Batches have traces of like length, so that
        little is padding; which ones is drawn again each time.
        """
        batch_tokens = min(step_tokens, BATCH_TOKENS)
        generator = random.Random(seed)  # of the order alone

        def draw() -> list[list[int]]:
            return _shuffle(self._lengths, batch_tokens, generator)

        def size(places: Sequence[int]) -> int:
            return sum(self._lengths[place] for place in places)

        return plan_steps(draw, size, tokens, step_tokens)


def plan_steps(
    draw: Callable[[], Sequence[T]], size: Callable[[T], int], tokens: int, step_tokens: int
) -> list[list[T]]:
    """Return steps of about ``step_tokens``, each of pieces that are drawn until all are enough."""
    steps: list[list[T]] = [[]]
    planned = in_step = 0

    while planned < tokens:
        for piece in draw():
            if planned >= tokens:
                break
            if in_step >= step_tokens:
                steps.append([])
                in_step = 0

            steps[-1].append(piece)
            planned += size(piece)
            in_step += size(piece)

    return steps


def _shuffle(
    lengths: Sequence[int], batch_tokens: int, generator: random.Random
) -> list[list[int]]:
    """Return all traces in batches of like length, in random order."""
    places = list(range(len(lengths)))
    generator.shuffle(places)

    mean = sum(lengths) / len(lengths)
    pool = max(1, round(_POOL * batch_tokens / mean))

    batches: list[list[int]] = []
    for start in range(0, len(places), pool):
        own = sorted(places[start : start + pool], key=lengths.__getitem__)
        batches += _cut(lengths, own, batch_tokens)

    generator.shuffle(batches)
    return batches


def _cut(lengths: Sequence[int], places: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Cut a list of traces, the shortest first, into batches of so many tokens with padding."""
    batches: list[list[int]] = []
    for place in places:
        if not batches or (len(batches[-1]) + 1) * lengths[place] > batch_tokens:
            batches.append([])
        batches[-1].append(place)
    return batches


def split_evenly(
    batches: Sequence[Sequence[int]], lengths: Sequence[int], count: int
) -> list[Sequence[int]]:
    """Return batches so that processes can take them together, one each, with none left over.

    The longest is halved until that is so, or until every batch is one trace. What is taken
    together is of like size: all wait for the longest.
    """
    pieces = list(batches)
    if count == 1:
        return pieces

    def size(piece: Sequence[int]) -> int:
        return len(piece) * max(lengths[place] for place in piece)

    while len(pieces) % count:
        longest = max((piece for piece in pieces if len(piece) > 1), key=size, default=None)
        if longest is None:
            break

        pieces.remove(longest)
        pieces += [longest[::2], longest[1::2]]

    return sorted(pieces, key=size, reverse=True)


def choose_taught(traces: Sequence[Trace], width: int, stored_bytes: int) -> list[Trace]:
    """Return traces in order, as long as their states of so many numbers fit on the disk."""
    chosen: list[Trace] = []
    size_bytes = 0

    for trace in traces:
        size_bytes += 4 * width * len(trace.ids)
        if size_bytes > stored_bytes and chosen:
            break
        chosen.append(trace)

    return chosen


@contextmanager
def dense_states(
    dense: Checkpoint,
    traces: Sequence[Trace],
    folder: Path,
    name: str,
    device: torch.device,
    processes: Processes = ALONE,
) -> Iterator[Activations]:
    """Yield the dense model's last hidden states, states_TD of each trace; gone with the body."""
    blocks = Blocks(dense, "float32", device)
    tasks = sorted({trace.task for trace in traces})
    batches = make_batches(traces, tasks, held_out=False)
    owners = processes.owners([batch.ids_BT.numel() for batch in batches])
    own = [number for number, owner in enumerate(owners) if owner == processes.rank]

    width = dense.shape.hidden_size
    shapes = [(len(trace.ids), width) for trace in traces]
    states = Activations(shapes, folder / f"dense-{name}.bin")

    try:
        with (
            torch.inference_mode(),
            closing(Flow(blocks, batches, folder, f"passing-{name}")) as passing,
        ):
            passing.enter(own)
            for block in range(dense.shape.block_count):
                loaded = blocks.load(block)
                for number in own:
                    passing.leave(loaded, number)
                blocks.empty(block).to("meta")

            norm = blocks.last_norm()
            for number, places in enumerate(_places(traces, batches)):
                if number in own:
                    hidden_BTD = norm(blocks.place(passing.hidden[number])).cpu()

                for row, place in enumerate(places):
                    states_TD = torch.empty(shapes[place])
                    if number in own:
                        states_TD = hidden_BTD[row, : len(states_TD)].clone()
                    states[place] = processes.spread(states_TD, owners[number])

        yield states
    finally:
        states.close()


def _places(traces: Sequence[Trace], batches: Sequence[Batch]) -> list[list[int]]:
    """Return which traces each batch of :func:`make_batches` holds."""
    order = sorted(range(len(traces)), key=lambda i: (len(traces[i].ids), traces[i].index))

    places = []
    start = 0

    for batch in batches:
        stop = start + len(batch.ids_BT)
        places.append(order[start:stop])
        start = stop

    return places
