"""Continuous batching: keep every slot of the decoders busy until all sequences have ended.

A step decodes one token of every running sequence of a decoder and fills the rest of the batch with
prompts; a slot that finishes takes the next prompt. Several decoders step independently, each in
its own thread, and take their prompts from one queue. Knows no engine: a :class:`Decoder` runs the
batches, with the interpreter's lock released.
Source: iteration-level scheduling, Orca (OSDI 2022).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from racdeploy.decoding.sequence import Sequence

News = list[tuple[int, list[int]]]
"""New ids of a step, by the index of their sequence."""


class Row(NamedTuple):
    """One token of a batch."""

    token: int
    position: int
    slot: int
    wants_logits: bool


class Decoder(Protocol):
    """Runs batches of at most ``batch_tokens`` rows over slots, each with its own cache."""

    slots: int
    batch_tokens: int

    def decode(self, rows: SequenceOf[Row]) -> None: ...

    def logits_V(self, place: int) -> NDArray[np.float32]: ...

    def forget(self, slot: int) -> None: ...


class Batcher:
    """Runs sequences to their end.

    ``prefill_s`` and ``decode_s`` are the time in the decoders, one decoder's on average.

    Args:
        decoders: run the batches, side by side.
        sequences: what to run; they are changed in place.
    """

    def __init__(self, decoders: SequenceOf[Decoder], sequences: SequenceOf[Sequence]) -> None:
        self.prefill_s = 0.0
        self.decode_s = 0.0
        waiting = _Queue([s for s in sequences if s.finish_reason is None])
        self._lanes = [_Lane(decoder, waiting) for decoder in decoders]
        self._forced_first: News = [(s.index, list(s.ids)) for s in sequences if s.ids]

    def run(self, on_news: Callable[[News], None], cancelled: Callable[[], bool]) -> None:
        """Step until every sequence has ended or ``cancelled`` says so.

        Args:
            on_news: gets the new ids of each step; from the thread of a decoder where there are
                several, one call at a time.
            cancelled: asked before each step.
        """
        if self._forced_first:
            on_news(self._forced_first)

        # Deal the sequences round, so that no decoder starts with nothing.
        for slot in range(max(lane.slots for lane in self._lanes)):
            for lane in self._lanes:
                lane.fill(slot)

        if len(self._lanes) == 1:
            self._lanes[0].run(on_news, cancelled)
        else:
            self._run_together(on_news, cancelled)
        self.prefill_s = sum(lane.prefill_s for lane in self._lanes) / len(self._lanes)
        self.decode_s = sum(lane.decode_s for lane in self._lanes) / len(self._lanes)

    def _run_together(self, on_news: Callable[[News], None], cancelled: Callable[[], bool]) -> None:
        one_at_a_time = threading.Lock()
        failed = threading.Event()

        def pass_on(news: News) -> None:
            with one_at_a_time:
                on_news(news)

        def ended_early() -> bool:
            return failed.is_set() or cancelled()

        with ThreadPoolExecutor(len(self._lanes)) as pool:
            runs = [pool.submit(lane.run, pass_on, ended_early) for lane in self._lanes]
            for run in as_completed(runs):
                if run.exception() is not None:
                    failed.set()
        for run in runs:
            run.result()


class _Queue:
    """Sequences that wait for a slot, for the threads of all decoders."""

    def __init__(self, sequences: SequenceOf[Sequence]) -> None:
        self._waiting = deque(sequences)
        self._lock = threading.Lock()

    def take(self) -> Sequence | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None


class _Lane:
    """One decoder and what runs in its slots."""

    def __init__(self, decoder: Decoder, queue: _Queue) -> None:
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.slots = decoder.slots
        self._decoder = decoder
        self._queue = queue
        self._running: dict[int, Sequence] = {}
        self._positions = [0] * decoder.slots
        for slot in range(decoder.slots):  # the last run may have ended in the middle of a sequence
            decoder.forget(slot)

    def fill(self, slot: int) -> None:
        """Give a slot the next sequence, if both exist."""
        if slot < self.slots and (sequence := self._queue.take()) is not None:
            self._running[slot] = sequence
            self._positions[slot] = 0

    def run(self, on_news: Callable[[News], None], cancelled: Callable[[], bool]) -> None:
        """Step until nothing runs and nothing waits."""
        while self._running and not cancelled():
            news = self._step()
            if news:
                on_news(news)

            ended = [slot for slot, s in self._running.items() if s.finish_reason is not None]
            for slot in ended:
                del self._running[slot]
                self._decoder.forget(slot)
                self.fill(slot)

    def _step(self) -> News:
        """Decode one batch; every sequence that is fed up to date takes its step.

        The rows are in the order of their slots: llama.cpp computes neighbours together, and cuts a
        batch where a slot is skipped.
        """
        taken = self._take_tokens()
        rows: list[Row] = []
        up_to_date: list[tuple[Sequence, int]] = []
        decoding = 0

        for slot, tokens in sorted(taken.items()):
            sequence = self._running[slot]
            first = self._positions[slot]
            self._positions[slot] += len(tokens)
            rows += [Row(token, first + i, slot, False) for i, token in enumerate(tokens)]

            if tokens and not sequence.unfed:
                rows[-1] = rows[-1]._replace(wants_logits=True)
                up_to_date.append((sequence, len(rows) - 1))
                decoding += len(tokens) == 1

        started = time.perf_counter()
        self._decoder.decode(rows)
        elapsed_s = time.perf_counter() - started

        # A batch that mixes prompts and decoding is shared out by its tokens.
        decode_share = decoding / len(rows)
        self.decode_s += elapsed_s * decode_share
        self.prefill_s += elapsed_s * (1.0 - decode_share)
        return [(s.index, s.step(self._decoder.logits_V(place))) for s, place in up_to_date]

    def _take_tokens(self) -> dict[int, list[int]]:
        """Take the tokens of a batch by slot: one of each running sequence first, then prompts."""
        room = self._decoder.batch_tokens
        taken = {}
        for slot, sequence in sorted(self._running.items(), key=lambda s: len(s[1].unfed) > 1):
            taken[slot] = sequence.unfed[:room]
            sequence.unfed = sequence.unfed[room:]
            room -= len(taken[slot])
        return taken
