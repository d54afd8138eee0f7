"""The child process that holds a model: ``python -m racdeploy.decoding.worker MODULE``.

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
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from racdeploy.decoding.batching import Batcher, Decoder, News
from racdeploy.decoding.engine import EngineSettings, Sampling, ThinkingBudget
from racdeploy.decoding.messages import Header, read_message, write_message
from racdeploy.decoding.sequence import Sequence
from racdeploy.errors import ArtifactError, RacdeployError

if sys.platform != "win32":
    import resource

_SEND_EVERY_S = 0.05  # a reader sees no difference


class LoadedModel(Protocol):
    """A model in this process; ``about`` is what its engine says of itself, as JSON."""

    context_tokens: int
    vocabulary: int
    about: Mapping[str, Any]

    def decoders(self, sequences: int) -> SequenceOf[Decoder]:
        """Return what decodes so many sequences, side by side."""

    def teacher_forced(self, ids: SequenceOf[int], start: int) -> NDArray[np.float32]:
        """Return logits_TV of the next few ids; ``start`` is 0 or where the last call ended."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the ids of a text, None without a tokenizer."""
        return None


class _Inbox:
    """Requests as they come; a cancel overtakes them, and the end of the pipe ends the process."""

    def __init__(self, stream: BinaryIO) -> None:
        self.requests: queue.SimpleQueue[Header] = queue.SimpleQueue()
        self.cancelled_call = -1
        self._stream = stream
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (message := read_message(self._stream)) is not None:
            header, _ = message
            if header["op"] == "cancel":
                self.cancelled_call = header["call"]
            else:
                self.requests.put(header)

        os._exit(0)  # the parent is gone or done; the engine may be running in the other thread


class _Outbox:
    """Passes on new tokens: at once if one sequence runs or ends, else in lots to spare a core."""

    def __init__(self, sequences: SequenceOf[Sequence], send: Callable[[News], None]) -> None:
        self._sequences = sequences
        self._send = send
        self._waiting: dict[int, list[int]] = {}
        self._sent_at = float("-inf")

    def add(self, news: News) -> None:
        for index, ids in news:
            self._waiting.setdefault(index, []).extend(ids)

        ended = any(self._sequences[index].finish_reason is not None for index, _ in news)
        is_due = time.monotonic() - self._sent_at >= _SEND_EVERY_S
        if ended or is_due or len(self._sequences) == 1:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._send(list(self._waiting.items()))
            self._waiting = {}
            self._sent_at = time.monotonic()


class _Worker:
    def __init__(self, module: str, inbox: _Inbox, out: BinaryIO) -> None:
        self._module = module
        self._inbox = inbox
        self._out = out
        self._call = -1
        self._model: LoadedModel
        counted = ("load_ms", "prefill_s", "decode_s", "prompt_tokens", "generated_tokens")
        self._stats: dict[str, float] = dict.fromkeys(counted, 0)

    def serve(self) -> None:
        while True:
            request = self._inbox.requests.get()
            self._call = request["call"]
            carry_out = getattr(self, f"_{request['op']}")  # as _load and those below it

            try:
                answer = carry_out(request)
            except RacdeployError as error:
                damaged = isinstance(error, ArtifactError)
                self._send("error", message=error.message, remedy=error.remedy, damaged=damaged)
            else:
                stats = {**self._stats, "peak_rss_bytes": _peak_rss_bytes()}
                self._send("done", stats=stats, **answer)

    def _load(self, request: Header) -> dict[str, Any]:
        started = time.perf_counter()
        settings = EngineSettings(**request["settings"])
        # Imported only now: what the engine prints must not land between two frames.
        self._model = importlib.import_module(self._module).load(request, settings)
        self._stats["load_ms"] = (time.perf_counter() - started) * 1000.0
        return {"vocabulary": self._model.vocabulary, "about": dict(self._model.about)}

    def _tokenize(self, request: Header) -> dict[str, Any]:
        return {"ids": self._model.tokenize(request["text"])}

    def _logits(self, request: Header) -> dict[str, Any]:
        ids = request["ids"]

        start = 0

        while start < len(ids):
            logits_TV = self._model.teacher_forced(ids, start)
            payload = logits_TV.astype("<f4").tobytes()
            self._send("rows", payload, start=start)
            start += len(logits_TV)

        return {}

    def _generate(self, request: Header) -> dict[str, Any]:
        prompts = request["prompts"]
        sampling = _read_sampling(request["sampling"])
        context_tokens = self._model.context_tokens
        sequences = [Sequence(i, ids, sampling, context_tokens) for i, ids in enumerate(prompts)]

        def send(news: News) -> None:
            if request["stream"]:
                self._send("tokens", news=news)

        outbox = _Outbox(sequences, send)
        batcher = Batcher(self._model.decoders(len(sequences)), sequences)
        batcher.run(outbox.add, lambda: self._inbox.cancelled_call == self._call)
        outbox.flush()

        self._stats["prefill_s"] += batcher.prefill_s
        self._stats["decode_s"] += batcher.decode_s
        self._stats["prompt_tokens"] += sum(map(len, prompts))

        completions = []
        for sequence in sequences:
            sequence.cancel()
            self._stats["generated_tokens"] += len(sequence.ids)
            completions.append((sequence.ids, sequence.finish_reason, sequence.forced_at))

        return {"completions": completions}

    def _send(self, event: str, payload: bytes = b"", **values: Any) -> None:
        header = {"call": self._call, "event": event, **values}
        write_message(self._out, header, payload)


def _read_sampling(values: Header) -> Sampling:
    """Rebuild a :class:`Sampling` from JSON, which has lists for its tuples: both do here."""
    budget = values["budget"]
    return Sampling(**{**values, "budget": ThinkingBudget(**budget) if budget else None})


def _peak_rss_bytes() -> int:
    """Return peak resident memory, 0 if unknown; getrusage counts the parent's before exec, too."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024

    if sys.platform == "win32":
        return 0

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Keep the pipes for messages alone, then answer requests until the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort is expected

    inbox = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)

    _Worker(sys.argv[1], _Inbox(inbox), out).serve()


if __name__ == "__main__":
    main()
