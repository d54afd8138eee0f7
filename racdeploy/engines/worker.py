"""The child process that holds a model: ``python -m racdeploy.engines.worker MODULE``.

Reads stdin, answers on what was stdout, and ends when stdin ends, even while it computes: a dead
parent leaves no child. ``MODULE`` has ``load(request, settings) -> LoadedModel``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from racdeploy.engines import allowance
from racdeploy.engines.batching import Batcher, Decoder, Job, News
from racdeploy.engines.engine import (
    Completion,
    EngineSettings,
    Logits,
    Sampling,
    ThinkingBudget,
)
from racdeploy.engines.sequence import Sequence
from racdeploy.errors import ArtifactError, EngineError, RacdeployError
from racdeploy.processes.memory import resident_bytes
from racdeploy.processes.messages import Header, read_message, write_message
from racdeploy.sandbox.limits import StepLimit, limit_memory

if sys.platform != "win32":
    import resource

_SEND_EVERY_S = 0.05  # a reader sees no difference


class LoadedModel(Protocol):
    """A model in this process; ``about`` is what its engine says of itself, as JSON."""

    context_tokens: int
    vocabulary: int
    about: Mapping[str, Any]

    def decoders(self) -> SequenceOf[Decoder]:
        """Return what decodes, side by side; the first one's slot 0 is used by teacher_forced."""

    def teacher_forced(self, ids: SequenceOf[int], start: int) -> Logits:
        """Return logits_TV of the next few ids; ``start`` is 0 or where the last call ended."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text, None without a tokenizer."""
        return None


class _Inbox:
    """Requests as they come; a cancel overtakes them, and the end of the pipe ends the process."""

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

        os._exit(0)  # the parent is gone or done; the engine may be running in another thread


@dataclass
class _Outbox:
    """Passes on new tokens: at once if one sequence runs or ends, else in lots to spare a core."""

    send: Callable[[News], None]
    is_alone: Callable[[], bool]
    waiting: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, Completion] = field(default_factory=dict)
    sent_at: float = float("-inf")

    def add(self, news: News) -> None:
        for index, ids, ended in news:
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
    """Carries out requests in their order; those that generate run together, see ``batching``."""

    def __init__(self, module: str, inbox: _Inbox, out: BinaryIO, started: float) -> None:
        self._module = module
        self._started = started  # a time of perf_counter
        self._inbox = inbox
        self._out = out
        self._one_at_a_time = threading.Lock()  # frames are whole
        self._model: LoadedModel
        self._batcher: Batcher
        self._allow_step: Callable[[], None]
        counted = ("load_ms", "prompt_tokens", "generated_tokens")
        self._stats: dict[str, float] = dict.fromkeys(counted, 0)

        self._jobs_lock = threading.RLock()  # a job may end while it is started
        self._jobs: dict[int, Job] = {}
        self._latest = 0  # call that was taken from the inbox
        self._cancelled_early: set[int] = set()  # calls that are still in the inbox
        inbox.cancel = self._cancel

    def serve(self) -> None:
        while True:
            request = self._inbox.requests.get()
            call = request["call"]
            carry_out = getattr(self, f"_{request['op']}")  # as _load and those below it

            try:
                answer = carry_out(request)
            except RacdeployError as error:
                self._send_error(call, error)
            except MemoryError:
                lack = EngineError(
                    "memory-limit-exceeded",
                    "the model takes more memory than its process may",
                    remedy="if you trust it, load it with a higher memory_limit_bytes",
                )
                self._send_error(call, lack)
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
        return {"vocabulary": self._model.vocabulary, "about": dict(self._model.about)}

    def _tokenize(self, request: Header) -> Header:
        self._allow_step()
        return {"ids": self._model.tokenize(request["text"])}

    def _logits(self, request: Header) -> Header:
        ids = request["ids"]
        start = 0
        with self._batcher.paused():
            while start < len(ids):
                self._allow_step()
                logits_TV = self._model.teacher_forced(ids, start)
                payload = logits_TV.astype("<f4").tobytes()
                self._send(request["call"], "rows", payload, start=start)
                start += len(logits_TV)

        return {}

    def _generate(self, request: Header) -> None:
        """Start a job and return; its end is its answer."""
        call = request["call"]
        prompts = request["prompts"]
        sampling = _read_sampling(request["sampling"])
        context_tokens = self._model.context_tokens
        sequences = [Sequence(i, ids, sampling, context_tokens) for i, ids in enumerate(prompts)]

        def send(news: News) -> None:
            if request["stream"]:
                told = [(i, ids, _write(ended) if ended else None) for i, ids, ended in news]
                self._send(call, "tokens", news=told)

        def end() -> None:
            outbox.flush()
            self._end(call, job)

        def is_alone() -> bool:
            return len(sequences) == 1 and self._batcher.running == 1

        outbox = _Outbox(send, is_alone)
        job = Job(sequences, outbox.add, end)

        with self._jobs_lock:
            self._jobs[call] = job
            self._latest = call
            self._batcher.start(job)

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
        self._send(call, "alive")  # it was heard, though a long step may still run

    def _end(self, call: int, job: Job) -> None:
        """Send what a job has come to."""
        with self._jobs_lock:
            del self._jobs[call]

            for sequence in job.sequences:
                sequence.cancel()
                self._stats["prompt_tokens"] += sequence.prompt_tokens
                self._stats["generated_tokens"] += len(sequence.ids)

        if job.error is not None:
            self._send_error(call, job.error)
            return

        completions = [sequence.completion() for sequence in job.sequences]
        self._send_done(call, {"completions": [*map(_write, completions)]})

    def _send_done(self, call: int, answer: Mapping[str, Any]) -> None:
        stats = {**self._stats, **self._batcher.seconds, "peak_rss_bytes": _peak_rss_bytes()}
        self._send(call, "done", stats=stats, **answer)

    def _send_error(self, call: int, error: RacdeployError) -> None:
        damaged = isinstance(error, ArtifactError)
        self._send(
            call,
            "error",
            code=error.code,
            message=error.message,
            remedy=error.remedy,
            damaged=damaged,
        )

    def _send(self, call: int, event: str, payload: bytes = b"", **values: Any) -> None:
        header = {"call": call, "event": event, **values}
        with self._one_at_a_time:
            write_message(self._out, header, payload)


def _write(completion: Completion) -> tuple[object, ...]:
    return completion.ids, completion.finish_reason, completion.forced_at


def _read_sampling(values: Header) -> Sampling:
    """Rebuild a :class:`Sampling` from JSON, which has lists for its tuples: both do here."""
    budget = values["budget"]
    return Sampling(**{**values, "budget": ThinkingBudget(**budget) if budget else None})


def _peak_rss_bytes() -> int:
    """Return peak resident memory, 0 if unknown; getrusage counts the parent's before exec, too."""
    peak_bytes = resident_bytes("VmHWM")
    if peak_bytes or sys.platform == "win32":
        return peak_bytes

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _die(failure: threading.ExceptHookArgs) -> None:
    """End the process where a thread of it fails: the parent reads why, and waits for nothing."""
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    os._exit(1)


def main() -> None:
    """Keep the pipes for messages alone, then answer requests until the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected

    threading.excepthook = _die
    inbox = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)

    # An import may start programs, and keeps what it has compiled, so the engine's comes before.
    # What is wrong with it is the answer to the request to load.
    started = time.perf_counter()
    with contextlib.suppress(RacdeployError):
        importlib.import_module(sys.argv[1])
    allowance.restrict()

    _Worker(sys.argv[1], _Inbox(inbox), out, started).serve()


if __name__ == "__main__":
    main()
