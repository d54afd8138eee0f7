"""Continuous batching: keep every slot of a decoder busy until all sequences have ended.

A step decodes one token of every running sequence and fills the rest of the batch with prompts; a slot that
finishes takes the next prompt. Knows no engine: a :class:`Decoder` runs the batches.
Source: iteration-level scheduling, Orca (OSDI 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from racdeploy.backends._sequence import Sequence

News = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class Row:
    """One token of a batch."""

    token: int
    position: int
    slot: int
    wants_logits: bool


class Decoder(Protocol):
    """Runs batches over slots, each with a cache of its own."""

    slots: int
    batch_tokens: int

    def decode(self, rows: SequenceOf[Row]) -> None: ...

    def logits_V(self, place: int) -> NDArray[np.float32]: ...

    def forget(self, slot: int) -> None: ...


class Batcher:
    """Runs sequences to their end.

    Args:
        decoder: runs the batches.
        sequences: what to run; they are changed in place.
    """

    def __init__(self, decoder: Decoder, sequences: SequenceOf[Sequence]) -> None:
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self._decoder = decoder
        self._waiting = [s for s in reversed(sequences) if s.finish_reason is None]
        self._running: dict[int, Sequence] = {}
        self._positions = [0] * decoder.slots
        self._forced_first: News = [(s.index, list(s.ids)) for s in sequences if s.ids]

    def run(self, on_news: Callable[[News], None], cancelled: Callable[[], bool]) -> None:
        """Step until every sequence has ended or ``cancelled`` says so.

        Args:
            on_news: gets (sequence index, new ids) of each step.
            cancelled: asked before each step.
        """
        for slot in range(self._decoder.slots):  # the last run may have ended in the middle of a sequence
            self._decoder.forget(slot)
        if self._forced_first:
            on_news(self._forced_first)
        while (self._waiting or self._running) and not cancelled():
            self._fill_slots()
            news = self._step()
            if news:
                on_news(news)
            self._free_slots()

    def _fill_slots(self) -> None:
        for slot in range(self._decoder.slots):
            if self._waiting and slot not in self._running:
                self._running[slot] = self._waiting.pop()
                self._positions[slot] = 0

    def _free_slots(self) -> None:
        for slot in [slot for slot, s in self._running.items() if s.finish_reason is not None]:
            del self._running[slot]
            self._decoder.forget(slot)

    def _step(self) -> News:
        """Decode one batch; every sequence that is fed up to date takes its step."""
        rows: list[Row] = []
        up_to_date: list[tuple[Sequence, int]] = []
        decoding = sum(len(s.unfed) == 1 for s in self._running.values())
        for slot, sequence in sorted(self._running.items(), key=lambda item: len(item[1].unfed) > 1):
            room = self._decoder.batch_tokens - len(rows)
            taken, sequence.unfed = sequence.unfed[:room], sequence.unfed[room:]
            first = self._positions[slot]
            self._positions[slot] += len(taken)
            rows.extend(Row(token, position, slot, False) for position, token in enumerate(taken, first))
            if taken and not sequence.unfed:
                rows[-1] = Row(taken[-1], rows[-1].position, slot, True)
                up_to_date.append((sequence, len(rows) - 1))
        started = time.perf_counter()
        self._decoder.decode(rows)
        self._account(time.perf_counter() - started, min(decoding, len(rows)) / len(rows))
        return [(s.index, s.step(self._decoder.logits_V(place))) for s, place in up_to_date]

    def _account(self, elapsed_s: float, decode_share: float) -> None:
        """Book the time of a batch; one that mixes prompts and decoding is shared out by its tokens."""
        self.decode_s += elapsed_s * decode_share
        self.prefill_s += elapsed_s * (1.0 - decode_share)
