"""Continuous batching: requests join what runs as soon as a slot is free, and leave when they end.

A step decodes one token of every running sequence and fills the rest of the batch with prompts.
Several decoders step independently, each in its own thread. Requests take turns: one that asks for
hundreds of sequences does not keep a later one waiting for all of them.
Source: iteration-level scheduling, Orca (OSDI 2022).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from racdeploy.engines.engine import Completion, Logits
from racdeploy.engines.sequence import Sequence
from racdeploy.errors import EngineError

News = list[tuple[int, list[int], Completion | None]]
"""The index of each sequence with its new ids of a step, and its completion if it ended."""
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

    def logits_V(self, place: int) -> Logits: ...

    def forget(self, slot: int) -> None: ...

    def share_threads(self, busy: int) -> None:
        """Take an equal share of the threads, where so many decoders work."""


class Job:
    """The sequences of one request, and who hears of them.

    Args:
        on_news: gets new ids; one call at a time.
        on_end: called once, when all have ended; ``error`` then says what failed, if anything.
    """

    def __init__(
        self, sequences: SequenceOf[Sequence], on_news: OnNews, on_end: Callable[[], None]
    ) -> None:
        self.sequences = sequences
        self.on_end = on_end
        self.error: EngineError | None = None

        # Guarded by the batcher's lock.
        self.waiting = deque(s for s in sequences if s.finish_reason is None)
        self.running = 0
        self.is_over = False

        self._on_news = on_news
        self._one_at_a_time = threading.Lock()

    def tell(self, news: News) -> None:
        with self._one_at_a_time:
            self._on_news(news)


class Batcher:
    """Runs the sequences of jobs to their end, in place, on decoders side by side.

    Of ``seconds``, ``prefill_s`` and ``decode_s`` are the time in the decoders, of those that work
    together that of one on average; a mixed batch is shared out by its tokens. ``decode_cpu_s`` is
    what of it the processor gave the thread that decodes. ``on_step`` is called before each batch.
    """

    def __init__(
        self, decoders: SequenceOf[Decoder], on_step: Callable[[], None] = lambda: None
    ) -> None:
        self.seconds = dict.fromkeys(("prefill_s", "decode_s", "decode_cpu_s"), 0.0)
        self._jobs: deque[Job] = deque()  # those with sequences that wait
        self._changed = threading.Condition()
        self._lanes = [_Lane(decoder, on_step) for decoder in decoders]

        for lane in self._lanes:
            threading.Thread(target=self._run, args=(lane,), daemon=True).start()

    @property
    def running(self) -> int:
        """How many sequences are being decoded now."""
        return sum(len(lane.running) for lane in self._lanes)

    def start(self, job: Job) -> None:
        """Begin a job, behind those that wait already."""
        known = [s for s in job.sequences if s.forced_first or s.finish_reason]
        if known:
            job.tell([(s.index, s.forced_first, s.ended) for s in known])

        if not job.waiting:
            job.on_end()
            return

        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job where it is; harmless where it has ended."""
        with self._changed:
            has_ended = not job.waiting and not job.running
            self._drop(job)
            is_idle = not job.running

        if is_idle and not has_ended:
            job.on_end()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the end of all jobs; the caller has the decoders and starts no job meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self.running)

        try:
            yield
        finally:
            for lane in self._lanes:
                for slot in range(lane.decoder.slots):
                    lane.decoder.forget(slot)

    def _run(self, lane: _Lane) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fill(lane))
                busy = sum(bool(other.running) for other in self._lanes)

            step = lane.step(busy)
            for job, news in step.news.items():
                job.tell(news)

            with self._changed:
                for name, seconds in step.seconds.items():
                    self.seconds[name] += seconds / busy
                ended = self._settle(lane, step.errors)
                self._changed.notify_all()

            for job in ended:
                job.on_end()

    def _fill(self, lane: _Lane) -> bool:
        """Take sequences into free slots; return whether the lane has any to decode."""
        while self._jobs and lane.free and self._is_least_busy(lane):
            job = self._jobs.popleft()
            lane.take(job, job.waiting.popleft())
            job.running += 1
            if job.waiting:
                self._jobs.append(job)

        return bool(lane.running)

    def _is_least_busy(self, lane: _Lane) -> bool:
        """Return whether no other lane with a free slot has less to do."""
        others = [len(other.running) for other in self._lanes if other.free]
        return len(lane.running) == min(others)

    def _settle(self, lane: _Lane, errors: dict[Job, EngineError]) -> list[Job]:
        """Free the slots of what has ended; return the jobs that have."""
        for job, error in errors.items():
            job.error = job.error or error
            self._drop(job)

        ended = []
        for slot, (job, sequence) in list(lane.running.items()):
            if sequence.finish_reason is None and not job.is_over:
                continue

            lane.release(slot)
            job.running -= 1
            if not job.running and not job.waiting:
                ended.append(job)

        return ended

    def _drop(self, job: Job) -> None:
        job.is_over = True
        job.waiting.clear()
        with contextlib.suppress(ValueError):  # none of it waited
            self._jobs.remove(job)


class _Step(NamedTuple):
    """What a batch gave: new ids and errors by their jobs, and seconds by their name."""

    news: dict[Job, News]
    errors: dict[Job, EngineError]
    seconds: dict[str, float]


class _Lane:
    """A decoder and the sequences in its slots."""

    def __init__(self, decoder: Decoder, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self.running: dict[int, tuple[Job, Sequence]] = {}
        self.free = list(range(decoder.slots))
        self.decoder = decoder
        self._positions = [0] * decoder.slots

    def take(self, job: Job, sequence: Sequence) -> None:
        slot = self.free.pop(0)
        self.running[slot] = (job, sequence)
        self._positions[slot] = 0

    def release(self, slot: int) -> None:
        del self.running[slot]
        self.decoder.forget(slot)
        self.free.append(slot)
        self.free.sort()

    def step(self, busy: int) -> _Step:
        """Decode one batch; every sequence that is fed up to date takes its step."""
        rows: list[Row] = []
        up_to_date: dict[int, int] = {}  # the slots, by the place of their last row
        decoding = 0

        for slot, tokens in sorted(self._take_tokens().items()):  # llama.cpp wants slots in order
            for token in tokens:
                rows.append(Row(token, self._positions[slot], slot, False))
                self._positions[slot] += 1

            _, sequence = self.running[slot]
            if tokens and not sequence.unfed:
                last = len(rows) - 1
                rows[last] = rows[last]._replace(wants_logits=True)
                up_to_date[last] = slot
                decoding += len(tokens) == 1

        self.decoder.share_threads(busy)
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            self._on_step()
            self.decoder.decode(rows)
        except EngineError as error:
            return _Step({}, {job: error for job, _ in self.running.values()}, {})
        elapsed_s = time.perf_counter() - started
        cpu_s = time.thread_time() - cpu_started

        news, errors = self._choose(up_to_date)
        decode_share = decoding / len(rows)
        seconds = {
            "prefill_s": elapsed_s * (1.0 - decode_share),
            "decode_s": elapsed_s * decode_share,
            "decode_cpu_s": cpu_s * decode_share,
        }
        return _Step(news, errors, seconds)

    def _choose(self, places: dict[int, int]) -> tuple[dict[Job, News], dict[Job, EngineError]]:
        """Let the sequences of some slots choose their next token, by the rows at those places."""
        news: dict[Job, News] = {}
        errors: dict[Job, EngineError] = {}

        for place, slot in places.items():
            job, sequence = self.running[slot]
            try:
                ids = sequence.step(self.decoder.logits_V(place))
            except EngineError as error:
                errors[job] = error
                continue

            news.setdefault(job, []).append((sequence.index, ids, sequence.ended))

        return news, errors

    def _take_tokens(self) -> dict[int, list[int]]:
        """Take the tokens of a batch by slot: one of each running sequence first, then prompts."""
        room = self.decoder.batch_tokens
        taken = {}
        for slot, (_, sequence) in sorted(self.running.items(), key=_has_prompt):
            tokens = taken[slot] = sequence.unfed[:room]
            sequence.unfed = sequence.unfed[room:]
            room -= len(tokens)

        return taken


def _has_prompt(item: tuple[int, tuple[Job, Sequence]]) -> bool:
    _, (_, sequence) = item
    return len(sequence.unfed) > 1
