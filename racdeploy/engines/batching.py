"""Continuous batching: requests join the batch when a slot is free, and leave it when they end.

A step decodes one token of every running sequence and fills the rest of the batch with prompts.
Several decoders step independently, each in its own thread. Requests take turns: a request of
hundreds of sequences does not block a later one.
Source: iteration-level scheduling, Orca (OSDI 2022).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from racdeploy.engines.engine import Completion, Logits
from racdeploy.engines.sequence import GeneratedSequence
from racdeploy.errors import EngineError

TokenUpdates = list[tuple[int, list[int], Completion | None]]
"""Of each sequence: its index, the new ids of a step, and its completion if it has ended."""
OnTokenUpdates = Callable[[TokenUpdates], None]


class BatchToken(NamedTuple):
    """One token of a batch."""

    token: int
    position: int
    slot: int
    wants_logits: bool


class Decoder(Protocol):
    """Runs batches of at most ``batch_tokens`` tokens over slots."""

    slots: int  # each has its own cache
    batch_tokens: int

    def decode(self, rows: Sequence[BatchToken]) -> None: ...  # releases the interpreter's lock

    def logits_V(self, row: int) -> Logits: ...

    def clear_slot(self, slot: int) -> None: ...

    def share_threads(self, busy: int) -> None:
        """Take an equal share of the threads while ``busy`` decoders work."""


class SequenceGroup:
    """The sequences of one request, with the callbacks that get their tokens.

    Args:
        on_updates: gets new ids; calls never overlap.
        on_end: called once, when all sequences have ended; a failure is in ``error`` then.
    """

    def __init__(
        self,
        sequences: Sequence[GeneratedSequence],
        on_updates: OnTokenUpdates,
        on_end: Callable[[], None],
    ) -> None:
        self.sequences = sequences
        self.on_end = on_end
        self.error: EngineError | None = None

        # The batcher's lock guards these three.
        self.waiting = deque(s for s in sequences if s.finish_reason is None)
        self.running = 0
        self.is_over = False

        self._on_updates = on_updates
        self._one_at_a_time = threading.Lock()

    def report(self, updates: TokenUpdates) -> None:
        with self._one_at_a_time:
            self._on_updates(updates)


class Batcher:
    """Runs sequence groups to their end on parallel decoders.

    ``seconds`` counts the time in the decoders: ``prefill_s``, ``decode_s`` and ``decode_cpu_s``,
    the processor time of the decoding thread. Where several decoders run at the same time, each
    adds its share only. A batch of prompt and generated tokens is divided by the tokens.
    ``on_step`` is called before each batch.
    """

    def __init__(
        self, decoders: Sequence[Decoder], on_step: Callable[[], None] = lambda: None
    ) -> None:
        self.seconds = dict.fromkeys(("prefill_s", "decode_s", "decode_cpu_s"), 0.0)
        self._jobs: deque[SequenceGroup] = deque()  # with sequences that wait for a slot
        self._changed = threading.Condition()
        self._runners = [_DecoderRunner(decoder, on_step) for decoder in decoders]

        for runner in self._runners:
            threading.Thread(target=self._run, args=(runner,), daemon=True).start()

    @property
    def running(self) -> int:
        """Number of sequences that are being decoded now."""
        return sum(len(runner.running) for runner in self._runners)

    def start(self, job: SequenceGroup) -> None:
        """Queue a sequence group behind those that already wait."""
        # A thinking budget of zero forces tokens, or ends a sequence, before any step.
        forced = [s for s in job.sequences if s.initial_forced_ids or s.finish_reason]
        if forced:
            job.report([(s.index, s.initial_forced_ids, s.final_completion) for s in forced])

        if not job.waiting:
            job.on_end()
            return

        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def cancel(self, job: SequenceGroup) -> None:
        """End a sequence group early; do nothing if it has ended."""
        with self._changed:
            has_ended = not job.waiting and not job.running
            self._drop(job)
            is_idle = not job.running

        if is_idle and not has_ended:
            job.on_end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait until every group has ended, then give the decoders to the body.

        The body must not start a group. All slots are cleared behind it.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self.running)

        try:
            yield
        finally:
            for runner in self._runners:
                for slot in range(runner.decoder.slots):
                    runner.decoder.clear_slot(slot)

    def _run(self, runner: _DecoderRunner) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fill(runner))
                busy = sum(bool(other.running) for other in self._runners)

            # Without the lock: decoders step at the same time, and callbacks may take long.
            step = runner.step(busy)
            for job, updates in step.updates.items():
                job.report(updates)

            with self._changed:
                for name, seconds in step.seconds.items():
                    self.seconds[name] += seconds / busy
                ended = self._release_ended(runner, step.errors)
                self._changed.notify_all()

            for job in ended:
                job.on_end()

    def _fill(self, runner: _DecoderRunner) -> bool:
        """Move waiting sequences into free slots; return whether the runner has any to decode."""
        while self._jobs and runner.free:
            counts = [len(other.running) for other in self._runners if other.free]
            if len(runner.running) > min(counts):  # another one takes it
                break
            job = self._jobs.popleft()
            runner.take(job, job.waiting.popleft())
            job.running += 1
            if job.waiting:
                self._jobs.append(job)  # at the end: groups take turns

        return bool(runner.running)

    def _release_ended(
        self, runner: _DecoderRunner, errors: dict[SequenceGroup, EngineError]
    ) -> list[SequenceGroup]:
        """Free the slots of ended sequences; return the groups that have ended."""
        for job, error in errors.items():
            job.error = job.error or error
            self._drop(job)

        ended = []
        for slot, (job, sequence) in list(runner.running.items()):
            if sequence.finish_reason is None and not job.is_over:
                continue

            runner.release(slot)
            job.running -= 1
            if not job.running and not job.waiting:
                ended.append(job)

        return ended

    def _drop(self, job: SequenceGroup) -> None:
        job.is_over = True
        job.waiting.clear()
        with suppress(ValueError):  # none of its sequences waited
            self._jobs.remove(job)


class _StepResult(NamedTuple):
    """New ids and errors of a batch by sequence group, and seconds by name."""

    updates: dict[SequenceGroup, TokenUpdates]
    errors: dict[SequenceGroup, EngineError]
    seconds: dict[str, float]


class _DecoderRunner:
    """One decoder with the sequences in its slots."""

    def __init__(self, decoder: Decoder, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self.running: dict[int, tuple[SequenceGroup, GeneratedSequence]] = {}
        self.free = list(range(decoder.slots))
        self.decoder = decoder
        self._positions = [0] * decoder.slots

    def take(self, job: SequenceGroup, sequence: GeneratedSequence) -> None:
        slot = self.free.pop(0)
        self.running[slot] = (job, sequence)
        self._positions[slot] = 0

    def release(self, slot: int) -> None:
        del self.running[slot]
        self.decoder.clear_slot(slot)
        self.free.append(slot)
        self.free.sort()

    def step(self, busy: int) -> _StepResult:
        """Decode one batch; each sequence without pending ids samples its next token."""
        rows = []
        sampling_slots = {}  # by the index of their last row
        decoding = 0

        for slot, tokens in sorted(self._take_tokens().items()):  # llama.cpp wants slots in order
            for token in tokens:
                rows.append(BatchToken(token, self._positions[slot], slot, False))
                self._positions[slot] += 1

            _, sequence = self.running[slot]
            if tokens and not sequence.pending_ids:
                last = len(rows) - 1
                rows[last] = rows[last]._replace(wants_logits=True)
                sampling_slots[last] = slot
                decoding += len(tokens) == 1

        self.decoder.share_threads(busy)
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            self._on_step()
            self.decoder.decode(rows)
        except EngineError as error:
            return _StepResult({}, {job: error for job, _ in self.running.values()}, {})
        elapsed_s = time.perf_counter() - started
        cpu_s = time.thread_time() - cpu_started

        updates, errors = self._sample(sampling_slots)

        # A row of a running sequence is a decoding step; all others read prompts.
        decode_share = decoding / len(rows)
        seconds = {
            "prefill_s": elapsed_s * (1.0 - decode_share),
            "decode_s": elapsed_s * decode_share,
            "decode_cpu_s": cpu_s * decode_share,
        }
        return _StepResult(updates, errors, seconds)

    def _sample(
        self, slots: dict[int, int]
    ) -> tuple[dict[SequenceGroup, TokenUpdates], dict[SequenceGroup, EngineError]]:
        """Sample the next token of sequences, given by slot and row of their logits."""
        updates: dict[SequenceGroup, TokenUpdates] = {}
        errors = {}

        for row, slot in slots.items():
            job, sequence = self.running[slot]
            try:
                ids = sequence.step(self.decoder.logits_V(row))
            except EngineError as error:
                errors[job] = error
                continue

            updates.setdefault(job, []).append((sequence.index, ids, sequence.final_completion))

        return updates, errors

    def _take_tokens(self) -> dict[int, list[int]]:
        """Return the tokens of a batch by slot: one of each running sequence, then prompts."""
        room = self.decoder.batch_tokens
        tokens_by_slot = {}
        running = sorted(self.running.items(), key=lambda item: len(item[1][1].pending_ids) > 1)
        for slot, (_, sequence) in running:
            tokens = tokens_by_slot[slot] = sequence.pending_ids[:room]
            sequence.pending_ids = sequence.pending_ids[room:]
            room -= len(tokens)

        return tokens_by_slot
