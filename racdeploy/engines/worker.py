"""Child process that holds a model: ``python -m racdeploy.engines.worker MODULE``.

It reads requests from stdin, writes responses to the original stdout, and ends when stdin ends,
even while it computes, so that no child outlives its parent. ``MODULE`` has
``load(request, settings) -> LoadedModel``.
"""

from __future__ import annotations

import importlib
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from racdeploy.engines import process_limits
from racdeploy.engines.batching import Batcher, Decoder, SequenceGroup, TokenUpdates
from racdeploy.engines.engine import (
    Completion,
    EngineSettings,
    Logits,
    Sampling,
    ThinkingBudget,
)
from racdeploy.engines.sequence import GeneratedSequence, Grammar
from racdeploy.errors import EngineError, RacdeployError
from racdeploy.processes.memory import resident_bytes
from racdeploy.processes.messages import (
    Header,
    describe_error,
    read_message,
    reserve_pipes,
    write_message,
)
from racdeploy.sandbox.limits import StepLimit, limit_memory

_SEND_EVERY_S = 0.05  # too short for a human reader to notice


class LoadedModel(Protocol):
    """A model in this process; its details are a JSON object."""

    context_tokens: int
    vocabulary: int
    info: Mapping[str, Any]

    def decoders(self) -> Sequence[Decoder]:
        """Return the parallel decoders; a teacher-forced pass uses slot 0 of the first."""

    def teacher_forced_logits(self, ids: Sequence[int], start: int) -> Logits:
        """Return logits_TV of the next few ids; ``start`` is 0 or where the last call ended."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text, None without a tokenizer."""
        return None

    def make_grammar(self, sampling: Sampling) -> Grammar | None:
        """Return a grammar of the sampling's schema; None without one, or without grammars."""
        return None


class _Inbox:
    """Queue of incoming requests; a cancellation overtakes them, a closed pipe ends the process."""

    def __init__(self, stream: BinaryIO) -> None:
        self.requests: queue.SimpleQueue[Header] = queue.SimpleQueue()
        self.cancel: Callable[[int], None] = lambda call: None
        self._stream = stream
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (message := read_message(self._stream)) is not None:
            header, _ = message
            if header["op"] == "cancel":
                self.cancel(header["call"])
            else:
                self.requests.put(header)

        os._exit(0)  # at once: the engine may be running in another thread


@dataclass
class _Outbox:
    """Sends new tokens at once if a sequence runs alone or ends, else in groups to spare a core."""

    send: Callable[[TokenUpdates], None]
    is_alone: Callable[[], bool]
    waiting: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, Completion] = field(default_factory=dict)
    sent_at: float = float("-inf")

    def add(self, updates: TokenUpdates) -> None:
        for index, ids, ended in updates:
            self.waiting.setdefault(index, []).extend(ids)
            if ended:
                self.ended[index] = ended

        is_due = time.monotonic() - self.sent_at >= _SEND_EVERY_S
        if self.ended or is_due or self.is_alone():
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.send([(i, ids, self.ended.get(i)) for i, ids in self.waiting.items()])
            self.waiting, self.ended = {}, {}
            self.sent_at = time.monotonic()


class _Worker:
    """Carries out requests in order; completions are generated together, see ``batching``."""

    def __init__(self, module: str, inbox: _Inbox, out: BinaryIO, started: float) -> None:
        self._module = module
        self._started = started  # from perf_counter
        self._inbox = inbox
        self._out = out
        self._sending = threading.Lock()  # frames must not mix
        self._model: LoadedModel
        self._batcher: Batcher
        self._allow_step: Callable[[], None]
        counted = ("load_ms", "prompt_tokens", "generated_tokens")
        self._stats: dict[str, float] = dict.fromkeys(counted, 0)

        self._jobs_lock = threading.RLock()  # reentrant: a group may end while it is started
        self._jobs: dict[int, SequenceGroup] = {}
        self._latest = 0  # number of the last request from the inbox
        self._cancelled_early: set[int] = set()  # numbers of requests that are still in the inbox
        inbox.cancel = self._cancel

    def serve(self) -> None:
        while True:
            request = self._inbox.requests.get()
            call = request["call"]
            carry_out = getattr(self, f"_{request['op']}")  # _load, _tokenize, _logits or _generate

            try:
                answer = carry_out(request)
            except RacdeployError as error:
                self._send(call, "error", **describe_error(error))
            except MemoryError:
                out_of_memory = EngineError(
                    "memory-limit-exceeded",
                    "the model needs more memory than its process may use",
                    remedy="if you trust it, load it with a higher memory_limit_bytes",
                )
                self._send(call, "error", **describe_error(out_of_memory))
            else:
                if answer is not None:
                    self._send_done(call, answer)

    def _load(self, request: Header) -> Header:
        settings = EngineSettings(**request["settings"])
        module = importlib.import_module(self._module)
        if settings.memory_limit_bytes:
            limit_memory(settings.memory_limit_bytes)

        self._allow_step = StepLimit(request["step_seconds"]).renew
        self._allow_step()
        self._model = module.load(request, settings)
        self._batcher = Batcher(self._model.decoders(), self._allow_step)
        self._stats["load_ms"] = (time.perf_counter() - self._started) * 1000.0
        return {"vocabulary": self._model.vocabulary, "info": dict(self._model.info)}

    def _tokenize(self, request: Header) -> Header:
        self._allow_step()
        return {"ids": self._model.tokenize(request["text"])}

    def _logits(self, request: Header) -> Header:
        ids = request["ids"]
        start = 0
        with self._batcher.paused():
            while start < len(ids):
                self._allow_step()
                logits_TV = self._model.teacher_forced_logits(ids, start)
                payload = logits_TV.astype("<f4").tobytes()
                self._send(request["call"], "rows", payload, start=start)
                start += len(logits_TV)

        return {}

    def _generate(self, request: Header) -> None:
        """Start a sequence group; the response is sent when it ends."""
        call = request["call"]
        prompts = request["prompts"]
        values = request["sampling"]  # its tuples are lists, which work as well
        budget = ThinkingBudget(**values["budget"]) if values["budget"] else None
        sampling = Sampling(**{**values, "budget": budget})
        context_tokens = self._model.context_tokens

        sequences = []
        for index, ids in enumerate(prompts):
            grammar = self._model.make_grammar(sampling)  # it follows one answer
            sequence = GeneratedSequence(index, ids, sampling, context_tokens, grammar=grammar)
            sequences.append(sequence)

        def send(updates: TokenUpdates) -> None:
            if request["stream"]:
                self._send(call, "tokens", updates=[_write_update(*update) for update in updates])

        def end() -> None:
            outbox.flush()
            self._end(call, job)

        def is_alone() -> bool:
            return len(sequences) == 1 and self._batcher.running == 1

        outbox = _Outbox(send, is_alone)
        job = SequenceGroup(sequences, outbox.add, end)

        with self._jobs_lock:
            self._jobs[call] = job
            self._latest = call
            self._batcher.start(job)

            # The parent may cancel a request before it is taken from the inbox.
            if call in self._cancelled_early:
                self._batcher.cancel(job)
            self._cancelled_early = {other for other in self._cancelled_early if other > call}

    def _cancel(self, call: int) -> None:
        with self._jobs_lock:
            job = self._jobs.get(call)
            if call > self._latest:
                self._cancelled_early.add(call)

        if job is not None:
            self._batcher.cancel(job)
        self._send(call, "alive")  # received, though a long step may still run

    def _end(self, call: int, job: SequenceGroup) -> None:
        """Send the completions of an ended group, or its error."""
        with self._jobs_lock:
            del self._jobs[call]

            for sequence in job.sequences:
                sequence.cancel()
                self._stats["prompt_tokens"] += sequence.prompt_tokens
                self._stats["generated_tokens"] += len(sequence.ids)

        if job.error is not None:
            self._send(call, "error", **describe_error(job.error))
            return

        completions = [sequence.completion() for sequence in job.sequences]
        self._send_done(call, {"completions": [*map(_write, completions)]})

    def _send_done(self, call: int, answer: Mapping[str, Any]) -> None:
        stats = {**self._stats, **self._batcher.seconds, "peak_rss_bytes": _peak_rss_bytes()}
        self._send(call, "done", stats=stats, **answer)

    def _send(self, call: int, event: str, payload: bytes = b"", **values: Any) -> None:
        header = {"call": call, "event": event, **values}
        with self._sending:
            write_message(self._out, header, payload)


def _write_update(index: int, ids: Sequence[int], ended: Completion | None) -> tuple[object, ...]:
    return index, ids, _write(ended) if ended else None


def _write(completion: Completion) -> tuple[object, ...]:
    return completion.ids, completion.finish_reason, completion.forced_at


def _peak_rss_bytes() -> int:
    """Return peak resident memory, 0 if unknown.

    Not by getrusage on Linux: it includes the parent's memory before exec.
    """
    if peak_bytes := resident_bytes("VmHWM"):
        return peak_bytes

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _die(failure: threading.ExceptHookArgs) -> None:
    """End the process where a thread fails, so that the parent does not wait for it."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    os._exit(1)


def main() -> None:
    """Reserve the pipes for messages, then answer requests until the process ends."""
    inbox, out = reserve_pipes()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected
    threading.excepthook = _die

    # An import may start programs and write compiled files, so it comes before the restriction. If
    # it fails, the same error is the response to the load request.
    started = time.perf_counter()
    with suppress(RacdeployError):
        importlib.import_module(sys.argv[1])
    process_limits.restrict()

    _Worker(sys.argv[1], _Inbox(inbox), out, started).serve()


if __name__ == "__main__":
    main()
