"""Continuous batching: keep every slot of the decoders busy until all sequences have ended.

A step decodes one token of every running sequence and fills the rest of the batch with prompts.
Several decoders step independently, each in its own thread, and take prompts from one queue.
Source: iteration-level scheduling, Orca (OSDI 2022).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from racdeploy.decoding.engine import Cancel
from racdeploy.decoding.sequence import Sequence

News = list[tuple[int, list[int]]]
"""New ids of a step, by the index of their sequence."""
OnNews = Callable[[News], None]


class Row(NamedTuple):
    """One token of a batch."""

    token: int
    position: int
    slot: int
    wants_logits: bool


class Decoder(Protocol):
    """Runs batches of at most ``batch_tokens`` rows over slots."""

    slots: int  # each with its own cache
    batch_tokens: int

    def decode(self, rows: SequenceOf[Row]) -> None: ...  # releases the interpreter's lock

    def logits_V(self, place: int) -> NDArray[np.float32]: ...

    def forget(self, slot: int) -> None: ...


class Batcher:
    """Runs sequences to their end, in place, on decoders side by side."""

    def __init__(self, decoders: SequenceOf[Decoder], sequences: SequenceOf[Sequence]) -> None:
        self.prefill_s = 0.0  # in the decoders, one decoder's on average, as below
        self.decode_s = 0.0
        self._forced_first: News = [(s.index, list(s.ids)) for s in sequences if s.ids]

        waiting: queue.SimpleQueue[Sequence] = queue.SimpleQueue()

        for sequence in sequences:
            if sequence.finish_reason is None:
                waiting.put(sequence)

        self._lanes = [_Lane(decoder, waiting) for decoder in decoders]

    def run(self, on_news: OnNews, cancelled: Cancel) -> None:
        """Step until all have ended or ``cancelled``; one call of ``on_news`` at a time."""
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

    def _run_together(self, on_news: OnNews, cancelled: Cancel) -> None:
        one_at_a_time = threading.Lock()
        over = threading.Event()

        def pass_on(news: News) -> None:
            with one_at_a_time:
                on_news(news)

        def ended_early() -> bool:
            return over.is_set() or cancelled()

        with ThreadPoolExecutor(len(self._lanes)) as pool:
            runs = [pool.submit(lane.run, pass_on, ended_early) for lane in self._lanes]
            wait(runs, return_when=FIRST_EXCEPTION)
            over.set()  # where one failed, the others need not continue

        for run in runs:
            run.result()


class _Lane:
    def __init__(self, decoder: Decoder, waiting: queue.SimpleQueue[Sequence]) -> None:
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.slots = decoder.slots
        self._decoder = decoder
        self._waiting = waiting
        self._running: dict[int, Sequence] = {}
        self._positions = [0] * decoder.slots

        for slot in range(decoder.slots):  # the last run may have ended in the middle of a sequence
            decoder.forget(slot)

    def fill(self, slot: int) -> None:
        if slot >= self.slots:
            return
        with contextlib.suppress(queue.Empty):
            self._running[slot] = self._waiting.get_nowait()
            self._positions[slot] = 0

    def run(self, on_news: OnNews, cancelled: Cancel) -> None:
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
        """Decode one batch; every sequence that is fed up to date takes its step."""
        rows: list[Row] = []
        up_to_date: dict[int, Sequence] = {}  # by the place of their last row
        decoding = 0

        for slot, tokens in sorted(self._take_tokens().items()):  # llama.cpp wants slots in order
            for token in tokens:
                rows.append(Row(token, self._positions[slot], slot, False))
                self._positions[slot] += 1

            sequence = self._running[slot]
            if tokens and not sequence.unfed:
                last = len(rows) - 1
                rows[last] = rows[last]._replace(wants_logits=True)
                up_to_date[last] = sequence
                decoding += len(tokens) == 1

        started = time.perf_counter()
        self._decoder.decode(rows)
        elapsed_s = time.perf_counter() - started

        decode_share = decoding / len(rows)  # a mixed batch is shared out by its tokens
        self.decode_s += elapsed_s * decode_share
        self.prefill_s += elapsed_s * (1.0 - decode_share)

        news = []
        for place, sequence in up_to_date.items():
            logits_V = self._decoder.logits_V(place)
            news.append((sequence.index, sequence.step(logits_V)))

        return news

    def _take_tokens(self) -> dict[int, list[int]]:
        """Take the tokens of a batch by slot: one of each running sequence first, then prompts."""
        room = self._decoder.batch_tokens

        taken = {}

        for slot, sequence in sorted(self._running.items(), key=lambda s: len(s[1].unfed) > 1):
            tokens = taken[slot] = sequence.unfed[:room]
            sequence.unfed = sequence.unfed[room:]
            room -= len(tokens)

        return taken
